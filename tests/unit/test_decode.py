"""Decoders: every kind of image and caption becomes a row of the batch, and every bad one a cause."""

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from pipeline.config import parse
from pipeline.data.decode import ImageDecoder, Resize, TextDecoder, captions
from pipeline.data.errors import BadSample
from pipeline.data.text import BpeTokenizer, train_bpe
from pipeline.towers.open_clip import Config as OpenClipConfig

SIZE = 16
COLOURS = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)


def encoded(image: PIL.Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png(width: int, height: int, rows: bytes) -> bytes:
    """A PNG of given size whose compressed rows are given as they are."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def cause_of(decode, data: bytes, extension: str) -> str:
    with pytest.raises(BadSample) as caught:
        decode(data, extension, 1)
    return caught.value.cause


@pytest.fixture(scope="module")
def images() -> ImageDecoder:
    return ImageDecoder(SIZE, Resize(SIZE))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BpeTokenizer:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe([f"a picture of a {a} {b}" for a in ("red", "blue", "grün") for b in ("house", "mouse", "tree")], 320, path)
    return BpeTokenizer(path, 8)


RGB = PIL.Image.fromarray(COLOURS)
KINDS = {
    "jpeg": (encoded(RGB, "JPEG", quality=95), "jpg"),
    "png": (encoded(RGB, "PNG"), "png"),
    "webp": (encoded(RGB, "WEBP", lossless=True), "webp"),
    "gif": (encoded(RGB, "GIF"), "gif"),
    "moving gif": (encoded(RGB, "GIF", save_all=True, append_images=[RGB.rotate(90)]), "gif"),
    "bmp": (encoded(RGB, "BMP"), "bmp"),
    "tiff": (encoded(RGB, "TIFF"), "tif"),
    "palette": (encoded(RGB.quantize(256), "PNG"), "png"),
    "cmyk": (encoded(RGB.convert("CMYK"), "JPEG", quality=95), "jpg"),
    "rgba": (encoded(RGB.convert("RGBA"), "PNG"), "png"),
    "png called jpg": (encoded(RGB, "PNG"), "jpg"),
}
DEEP = np.linspace(0, 65535, 40 * 30).reshape(40, 30).astype(np.uint16)
SHALLOW = PIL.Image.fromarray((DEEP >> 8).astype(np.uint8))
GREY = {
    "8 bit": encoded(SHALLOW, "PNG"),
    "1 bit": encoded(SHALLOW.convert("1"), "PNG"),
    "grey with alpha": encoded(SHALLOW.convert("LA"), "PNG"),
    "16 bit": encoded(PIL.Image.fromarray(DEEP), "PNG"),
    "16 bit tiff": encoded(PIL.Image.fromarray(DEEP), "TIFF"),
    "32 bit tiff": encoded(PIL.Image.fromarray(DEEP.astype(np.int32)), "TIFF"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_colour_image_becomes_bytes_of_one_size(images: ImageDecoder, kind: str) -> None:
    batch = images.collate([images(*KINDS[kind], None), None])
    assert batch.shape == (2, 3, SIZE, SIZE) and batch.dtype == torch.uint8 and batch.is_contiguous()
    expected = np.asarray(RGB.resize((SIZE, SIZE), PIL.Image.Resampling.BILINEAR), np.float64).transpose(2, 0, 1)
    assert np.abs(batch[0].numpy() - expected).mean() < 12  # palettes and lossy formats differ a little, a wrong channel order by 50
    assert not batch[1].any()


@pytest.mark.parametrize("kind", GREY)
def test_grey_images_keep_their_brightness(images: ImageDecoder, kind: str) -> None:
    batch = images.collate([images(GREY[kind], "png", None)])
    assert batch.shape == (1, 3, SIZE, SIZE) and batch.dtype == torch.uint8 and batch[0, 0].equal(batch[0, 2])
    rows = batch.float().mean((0, 1, 3))
    assert torch.allclose(rows, torch.linspace(8, 247, SIZE), atol=12)  # a ramp from black to white


def test_what_is_no_image_is_a_bad_sample(images: ImageDecoder) -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
    for data in (b"", b"a photo of a cat", b"\x00" * 1000, b"\x89PNG\r\n\x1a\n", b"II*\x00", postscript):
        assert cause_of(images, data, "png") == "image"
    whole = KINDS["png"][0]
    for length in (len(whole) // 2, len(whole) - 100, 60, 20):
        assert cause_of(images, whole[:length], "png") == "image"
    jpeg = KINDS["jpeg"][0]
    assert cause_of(images, jpeg[: len(jpeg) // 2], "jpg") == "image"


def test_a_flipped_bit_is_a_bad_sample_or_an_image_but_never_a_crash(images: ImageDecoder) -> None:
    whole, chance = KINDS["png"][0], random.Random(0)
    refused = 0
    for _ in range(200):
        data = bytearray(whole)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        try:
            item = images(bytes(data), "png", None)
            assert item.shape == (SIZE, SIZE, 3) and item.dtype == np.uint8
        except BadSample as error:
            refused += error.cause == "image"
    assert refused > 150  # a PNG carries checksums; what still passes, the index's own checksum catches


@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (8001, 8000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_before_it_is_unpacked(images: ImageDecoder, width: int, height: int) -> None:
    rows = zlib.compress(bytes(10_000_000), 9)  # 10 kB that would go on for gigabytes
    data = png(width, height, rows)
    assert len(data) < 20_000
    assert cause_of(images, data, "png") == "image_too_large"


def test_a_large_image_under_the_limit_is_decoded_without_a_warning(images: ImageDecoder, recwarn: pytest.WarningsRecorder) -> None:
    data = encoded(PIL.Image.new("L", (7900, 8000), 200), "PNG")
    assert images(data, "png", None).mean() == 200
    assert not [warning for warning in recwarn if "Decompression" in warning.category.__name__]


def test_captions_that_are_none_have_a_cause(tokenizer: BpeTokenizer) -> None:
    text = TextDecoder(tokenizer)
    none = {b"": "text_empty", b" \n\t\n": "text_empty", b"caf\xe9": "text_encoding", b"\xff\xfe": "text_encoding"}
    for data, cause in (none | {b"x" * 10_000_000: "text_too_long"}).items():
        assert cause_of(text, data, "txt") == cause
    assert captions("ein grünes Haus\r\n\n  noch eins \n".encode()) == ["ein grünes Haus", "noch eins"]


def test_one_of_several_captions_is_drawn_by_the_seed(tokenizer: BpeTokenizer) -> None:
    text, data = TextDecoder(tokenizer), b"one\ntwo\n\nthree\n"
    drawn = [text(data, "txt", seed) for seed in range(300)]
    assert drawn == [text(data, "txt", seed) for seed in range(300)]
    assert {word: drawn.count(word) for word in set(drawn)}.keys() == {"one", "two", "three"}
    assert all(60 < drawn.count(word) < 140 for word in ("one", "two", "three"))
    assert text(data, "txt", None) == "one"


@pytest.fixture(scope="module")
def augmenting(tmp_path_factory: pytest.TempPathFactory) -> ImageDecoder:
    """The training decoder of an open_clip tower that crops at random."""
    model = {"embed_dim": 8, "vision_cfg": {"image_size": 32}, "text_cfg": {}}
    config = parse(OpenClipConfig, {"model": model, "augmentation": {"scale": [0.5, 1.0]}}, "here")
    return config.decoders(tmp_path_factory.mktemp("run"), train=True)["image"]


def test_augmentation_depends_on_the_seed_alone_and_leaves_the_generators_alone(augmenting: ImageDecoder) -> None:
    data = KINDS["png"]
    first = [augmenting(*data, seed) for seed in range(8)]
    random.seed(99)
    torch.manual_seed(99)
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    again = [augmenting(*data, seed) for seed in reversed(range(8))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert len({item.tobytes() for item in first}) == 8
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert (np.random.get_state()[1] == before[2]).all()
    plain = augmenting(*data, None)  # evaluation
    assert plain.shape == (32, 32, 3) and all(not np.array_equal(plain, item) for item in first)


def test_a_bad_image_leaves_the_generators_alone_too(augmenting: ImageDecoder) -> None:
    before = random.getstate(), torch.get_rng_state()
    assert cause_of(augmenting, b"no image", "png") == "image"
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_tokens_have_one_length_and_end_in_the_highest_id(tokenizer: BpeTokenizer) -> None:
    tokens = tokenizer(["a red house", "a", "", "a picture of a blue mouse " * 50])
    assert tokens.shape == (4, 8) and tokens.dtype == torch.int64
    start, end = 1, tokenizer.vocab_size - 1
    assert tokens.max() == end and tokens.min() == 0 and (tokens[:, 0] == start).all()
    assert ((tokens == end).sum(1) == 1).all()  # also where the caption was cut
    assert tokens[3, -1] == end and tokens[2].tolist() == [start, end, 0, 0, 0, 0, 0, 0]
    place = tokens.argmax(1)  # where open_clip's text transformer pools
    assert all((tokens[i, at + 1 :] == 0).all() and (tokens[i, 1:at] > start).all() for i, at in enumerate(place))
    assert tokenizer(["A RED House"]).equal(tokenizer(["a red house"]))
    assert tokenizer([]).shape == (0, 8)


def test_a_tokenizer_is_the_same_after_it_was_written_and_read(tokenizer: BpeTokenizer, tmp_path: Path) -> None:
    texts = ["a grün tree", "日本語 \u0000 🎈", "", "x" * 10_000]
    again = BpeTokenizer(tokenizer.path, 8)
    assert again(texts).equal(tokenizer(texts)) and again.vocab_size == tokenizer.vocab_size <= 320
    ids = BpeTokenizer(tokenizer.path, 40)(["a grün tree, 日本語 🎈"])[0].tolist()
    assert again._tokenizer.decode(ids).strip() == "a grün tree, 日本語 🎈"  # bytes are never lost to an unknown token
    twice = tmp_path / "tokenizer.json"
    lines = ["b a", "a b", "c a b"] * 10
    train_bpe(iter(lines), 300, twice)
    one = twice.read_bytes()
    train_bpe(iter(lines), 300, twice)
    assert twice.read_bytes() == one


def test_captions_that_cannot_be_decoded_become_zeros(tokenizer: BpeTokenizer) -> None:
    tokens = TextDecoder(tokenizer).collate(["a red house", None, "a tree"])
    assert tokens.shape == (3, 8) and not tokens[1].any() and tokens[0].any() and tokens[2].equal(tokenizer(["a tree"])[0])
