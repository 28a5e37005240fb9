"""What the objectives share in which one feature of the student follows one of a teacher that receives no gradient."""

from pydantic import Field

from pipeline.objectives.base import ObjectiveConfig


class FollowConfig(ObjectiveConfig):
    """Which features, and which rows have a teacher."""

    student: str = "embedding"
    teacher: str = "teacher.embedding"
    present: str | None = Field(None, description="bool field of rows that the teacher has seen; the other rows train nothing here")

    def reads(self) -> tuple[str, ...]:
        return (self.student, self.teacher)

    def trains(self) -> tuple[str, ...]:
        return (self.student,)

    def fields(self) -> tuple[str, ...]:
        return (self.present,) if self.present else ()
