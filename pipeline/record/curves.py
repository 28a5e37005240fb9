"""Curves over steps from metrics.jsonl: what every run logs, what it was evaluated at on the way, what stage 2 tells of itself."""

from collections.abc import Sequence

from pipeline.record import plots
from pipeline.record.figures import percent
from pipeline.record.plots import Plot, Series, finite
from pipeline.record.runs import Run, dig, number


def series_of(runs: Sequence[Run], key: str) -> list[Series]:
    """A figure of the training lines, for each run that has it."""
    series = []
    for run in runs:
        lines = [line for line in run.metrics if number(line.get(key)) is not None]
        if lines:
            after = [line["step"] for line in lines if (number(line.get("visit")) or 0) >= (run.warmup_visits or 0)]
            end = min(after) if run.warmup_visits and after else None
            series.append(Series(run.label, [line["step"] for line in lines], finite([line[key] for line in lines]), run.number, end))
    return series


# what runs are evaluated at while they train: keys, title, axis, caption
_EVALUATED = (
    (("zero_shot_top1", "zero_shot.top1", "top1"), "Zero-shot accuracy on the way", "zero-shot top-1", "On held-out images."),
    (("miou",), "Mean IoU on the way", "mean IoU", "On held-out maps, the mean over the sensors."),
    (("accuracy",), "The student's accuracy on the way", "share right", "On held-out samples."),
    (
        ("teacher_auxiliary_probe",),
        "What the teacher keeps of the auxiliary modalities",
        "accuracy of a linear probe",
        "On what it makes of them alone, held-out samples. Where this falls while the rest rises, the teacher goes weak: it forgets what the student "
        "cannot see.",
    ),
)


def evaluation_plots(runs: Sequence[Run]) -> list[Plot]:
    """A chart of each figure that a run was evaluated at more than once."""
    found = []
    for keys, title, ylabel, caption in _EVALUATED:
        series = []
        for run in runs:
            points = [(line["step"], number(dig(line["eval"], *keys))) for line in run.evaluations]
            points = [(step, value) for step, value in points if value is not None]
            if len(points) > 1:
                series.append(Series(run.label, [step for step, _ in points], [value for _, value in points], run.number))
        if series:
            last = ", ".join(f"{one.label} {percent(one.y[-1])}" for one in series)
            svg = plots.lines(keys[0], series, xlabel="step", ylabel=ylabel, percent=True, floor=0)
            found.append(Plot(title, svg, f"{caption} Last: {last}.", f"Line chart of {title} over steps. Last: {last}."))
    return found


# what an objective tells of itself: suffix of its key, title, axis, caption, chance
_TELEMETRY = (
    (
        "information_teacher_student",
        "I(T;S), teacher and student",
        "nats, lower bound",
        "High is no proof of a good student: a teacher that sinks to the student's level has it too. Read it with I(T;A).",
        None,
    ),
    (
        "information_teacher_auxiliary",
        "I(T;A), teacher and auxiliary modality",
        "nats, lower bound",
        "What the teacher keeps of what the student cannot see. A fall means that the teacher goes weak.",
        None,
    ),
    (
        "teacher_to_guess",
        "H(T|S): the teacher's rows and their guess from the student's",
        "squared distance",
        "Of unit rows: 0 is a perfect guess, 2 says that they have nothing to do with each other.",
        None,
    ),
    (
        "critic_accuracy",
        "The critic's accuracy",
        "share told apart",
        "Of teacher's rows from guesses. Near 1 the student gets no gradient from it, near one half there is nothing left to tell.",
        0.5,
    ),
    ("agreement", "Agreement with the teacher", "share of rows", "Rows of which student and teacher name the same class.", None),
    (
        "label_agreement",
        "Pixels whose label is predicted",
        "share of labelled pixels",
        "Of the training labels as they are, wrong ones too: near 1 means that wrong labels are learnt by heart.",
        None,
    ),
    ("label_weight", "How far labels are believed", "mean weight", "Of all labelled pixels; 1 is every label in full.", None),
    ("cosine", "Features like the teacher's", "mean cosine", "Of the student's rows, after the projector, with the teacher's.", None),
)


def distillation_plots(runs: Sequence[Run]) -> list[Plot]:
    """A chart of each thing that objectives of stage 2 tell, and of the training accuracy of a teacher that is trained along."""
    found = []
    for suffix, title, ylabel, caption, chance in _TELEMETRY:
        series = [one for run in runs for key in _keys(run, suffix)[:1] for one in series_of([run], key)]
        found.append(_telemetry_plot(suffix, series, title, ylabel, caption, chance))
    series = [one for run in runs for key in _teacher_accuracies(run)[:1] for one in series_of([run], key)]
    caption = "On the rows that were trained. It sees more than the student: where it falls to the student's level it has gone weak."
    found.append(_telemetry_plot("teacher", series, "The online teacher's accuracy", "share right", caption, None))
    return [plot for plot in found if plot is not None]


def _keys(run: Run, suffix: str) -> list[str]:
    """The keys of a run's last line that end in `.suffix`, in the order of its objectives."""
    return [key for key in (run.metrics[-1] if run.metrics else {}) if key.endswith(f".{suffix}")]


def _teacher_accuracies(run: Run) -> list[str]:
    return [f"{name}.accuracy" for name, one in run.objectives.items() if str(one.get("feature", "")).startswith("teacher.")]


def _telemetry_plot(name: str, series: list[Series], title: str, ylabel: str, caption: str, chance: float | None) -> Plot | None:
    if not series:
        return None
    ends = ", ".join(f"{one.label} {one.y[-1]:.2f}" for one in series)
    svg = plots.lines(name, series, xlabel="step", ylabel=ylabel, chance=chance, smooth=True)
    return Plot(title, svg, f"{caption} Last: {ends}.", f"Line chart of {title} over steps. Last values: {ends}.")
