"""Which answer belongs to which kind of work."""

from __future__ import annotations

from typing import Any

from glm_batch.models.engine.api.request import (
    Choose,
    Classify,
    Embed,
    Generate,
    Inspect,
    Request,
    Score,
    Tag,
)
from glm_batch.models.engine.works.answer import Answer, Context
from glm_batch.models.engine.works.choose_answer import ChooseAnswer
from glm_batch.models.engine.works.generate_answer import GenerateAnswer
from glm_batch.models.engine.works.rows_answer import (
    ClassifyAnswer,
    EmbedAnswer,
    InspectAnswer,
    TagAnswer,
)
from glm_batch.models.engine.works.score_answer import ScoreAnswer

ANSWERS: dict[type, type[Answer[Any]]] = {
    Generate: GenerateAnswer,
    Choose: ChooseAnswer,
    Score: ScoreAnswer,
    Classify: ClassifyAnswer,
    Tag: TagAnswer,
    Embed: EmbedAnswer,
    Inspect: InspectAnswer,
}


def answer_to(request: Request, context: Context) -> Answer[Any]:
    """An answer with nothing in it yet."""
    prompt = list(map(int, request.input_ids))
    return ANSWERS[type(request.work)](request, prompt, context)
