"""The sections of `objective:`, one class for each. Configuration only; names and defaults are those of TRL's configs."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_serializer, model_validator

from hfstrat.recipe.rewards import Reward
from hfstrat.recipe.section import Default, Section, from_text

DpoLoss = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
]
SMOOTHED = ("exo_pair", "robust")  # the losses that `label_smoothing` changes


class ObjectiveSection(Section):
    """What is minimized. `name` tags the union; `rate` multiplies the strategy's default learning rate."""

    name: str
    rate: ClassVar[Default | None] = None
    rows: ClassVar[str] = "the task's"  # what the examples are: runs on others cannot be compared
    evaluation: ClassVar[dict[str, Default]] = {}  # defaults of `evaluation:` keys
    generates: ClassVar[bool] = False  # whether the model writes what it is trained on

    @property
    def has_reference(self) -> bool:
        """Whether evaluation compares the model with its own initial weights."""
        return False

    @property
    def measured(self) -> str:
        """What the numbers of an evaluation are about: runs can be compared where this is the same."""
        return f"{self.rows}, with rewards relative to a reference" if self.has_reference else self.rows

    def code(self) -> dict[str, str]:
        """Hashes of the user's files that the objective runs, by their path."""
        return {}


class Sft(ObjectiveSection):
    """The task's own loss: the cross-entropy of a causal LM or a classifier, the squared error of a regression."""

    name: Literal["sft"] = "sft"


ANSWERS = {  # a model that is rewarded for length writes longer answers
    "metrics": Default(["length"], "the length of answers, before and after"),
    "metric_rows": Default(32, "enough answers for an interval of their length"),
}


class Dpo(ObjectiveSection):
    """Direct preference optimization of pairs of answers (arXiv 2305.18290), as TRL's DPOTrainer computes it."""

    name: Literal["dpo"]
    beta: float = Field(0.1, gt=0, description="Strength of the penalty for leaving the reference; IPO's tau")
    loss_type: DpoLoss = Field(
        "sigmoid",
        description="Loss of a pair, by TRL's names: sigmoid (DPO), hinge (SLiC), ipo, exo_pair, nca_pair, robust, bco_pair, "
        "sppo_hard, apo_zero, apo_down, discopop, sigmoid_norm (DPO of means over tokens)",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="robust: the share of labels that are wrong; exo_pair: its epsilon, such as 0.001"
    )
    discopop_tau: float = Field(0.05, gt=0, description="Temperature of discopop")
    rows: ClassVar[str] = "pairs"
    evaluation: ClassVar[dict[str, Default]] = ANSWERS
    rate: ClassVar[Default] = Default(0.1, "a tenth: preferences are fitted in few steps; TRL trains all weights at 1e-6")

    @property
    def has_reference(self) -> bool:
        return True

    @model_validator(mode="after")
    def _fits_the_loss(self) -> Dpo:
        if self.label_smoothing and self.loss_type not in SMOOTHED:
            raise ValueError(
                f"label_smoothing: {self.loss_type} does not use it; remove it, or set loss_type to {' or '.join(SMOOTHED)}"
            )
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ValueError("label_smoothing: loss_type exo_pair needs one above 0, such as 0.001 (arXiv 2402.00856)")
        if self.loss_type != "discopop" and self.discopop_tau != type(self).model_fields["discopop_tau"].default:
            raise ValueError("discopop_tau: only used by loss_type: discopop; remove it")
        return self


class Orpo(ObjectiveSection):
    """Odds ratio preference optimization (arXiv 2403.07691): cross-entropy of the chosen answer with its prompt, plus the
    odds ratio of the two answers; there is no reference. As TRL's ORPOTrainer computes it."""

    name: Literal["orpo"]
    beta: float = Field(0.1, gt=0, description="Weight of the odds ratio (lambda in the paper)")
    rows: ClassVar[str] = "pairs"
    evaluation: ClassVar[dict[str, Default]] = ANSWERS
    rate: ClassVar[Default] = Default(0.4, "arXiv 2403.07691 trains all weights at 8e-6")


class Simpo(ObjectiveSection):
    """Simple preference optimization (arXiv 2405.14734): mean log-probabilities per token, a margin, and no reference.

    As TRL's CPOTrainer computes it with `loss_type: simpo` and `cpo_alpha: 0`; its default of beta, 0.1, is for sums.
    """

    name: Literal["simpo"]
    beta: float = Field(2.0, gt=0, description="Factor of the mean log-probabilities")
    simpo_gamma: float = Field(1.0, ge=0, description="Margin between the rewards of the two answers")
    rows: ClassVar[str] = "pairs"
    evaluation: ClassVar[dict[str, Default]] = ANSWERS
    rate: ClassVar[Default] = Default(0.05, "arXiv 2405.14734 trains all weights at 3e-7 to 1e-6")


class Kto(ObjectiveSection):
    """Kahneman-Tversky optimization of single answers with a label (arXiv 2402.01306), as TRL's KTOTrainer computes it."""

    name: Literal["kto"]
    beta: float = Field(0.1, gt=0, description="Strength of the penalty for leaving the reference")
    loss_type: Literal["kto", "apo_zero_unpaired"] = Field("kto", description="Loss of an answer, by TRL's names")
    desirable_weight: float = Field(1.0, gt=0, description="Weight of the losses of desirable answers")
    undesirable_weight: float = Field(1.0, gt=0, description="Weight of the losses of undesirable answers")
    rows: ClassVar[str] = "answers with labels"
    evaluation: ClassVar[dict[str, Default]] = ANSWERS
    rate: ClassVar[Default] = Default(0.1, "a tenth: as for dpo; TRL trains all weights at 1e-6")

    @property
    def has_reference(self) -> bool:
        return True


def _listed(value: Any) -> Any:
    """Read `rewards: json_valid` as a list of one."""
    return [value] if isinstance(value, str | dict | Reward) else value


OneReward = Annotated[Reward, from_text("name", Reward | str)]
Rewards = Annotated[
    list[OneReward], Field(min_length=1), BeforeValidator(_listed, json_schema_input_type=str | Reward | list[str | Reward])
]


class Grpo(ObjectiveSection):
    """Group relative policy optimization (arXiv 2402.03300): the model answers each prompt several times, and answers with more
    reward than the mean of their group become more likely. As TRL's GRPOTrainer computes it; its step begins with generation.

    A sequence of `training.global_batch_size` is a prompt with all of its `num_generations` answers.
    """

    name: Literal["grpo"]
    rewards: Rewards = Field(
        description="What scores an answer: a name or a mapping with name, or a list of these; their sum is maximized"
    )
    num_generations: int = Field(8, ge=2, description="Answers to each prompt")
    max_completion_length: int = Field(512, ge=1, description="Maximum number of tokens of an answer")
    temperature: float = Field(1.0, gt=0, description="Temperature of sampling")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the most probable tokens with this total probability")
    top_k: int = Field(0, ge=0, description="Sample from this many most probable tokens; 0: from all")
    beta: float = Field(
        0.0, ge=0, description="Weight of the divergence from the initial weights; above 0 they are kept as a second model"
    )
    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo", "cispo"] = Field(
        "dapo", description="How the loss is averaged over tokens and answers, by TRL's names"
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group", description="Divide advantages by the standard deviation of rewards in the group, in the batch, or not"
    )
    epsilon: float = Field(0.2, gt=0, description="Lower limit of the ratio of probabilities, below 1")
    epsilon_high: float | None = Field(None, gt=0, description="Upper limit of this ratio, above 1; default: epsilon")
    mask_truncated_completions: bool = Field(False, description="Leave answers that are cut at max_completion_length out")
    use_vllm: bool = Field(False, description="Generate with vLLM, which has to be installed")
    vllm_mode: Literal["colocate", "server"] = Field("colocate", description="use_vllm: in this process, or on a server")
    rows: ClassVar[str] = "prompts"
    generates: ClassVar[bool] = True
    rate: ClassVar[Default] = Default(0.1, "a tenth: TRL trains all weights at 1e-6")

    def code(self) -> dict[str, str]:
        files = sorted({reward.function[0] for reward in self.rewards if reward.function})
        return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}

    @field_serializer("rewards")
    def _short(self, value: list[Reward]) -> Any:
        """As they would be written by hand."""
        given = [reward.model_dump(exclude_defaults=True) for reward in value]
        return [reward["name"] if len(reward) == 1 else reward for reward in given]

    @property
    def evaluation(self) -> dict[str, Default]:  # type: ignore[override]
        return {
            "max_rows": Default(100, "the model answers each of them at every evaluation"),
            "max_new_tokens": Default(self.max_completion_length, "objective.max_completion_length"),
        }

    @property
    def measured(self) -> str:
        return f"{self.rows}, scored by {self.model_dump()['rewards']}"

    @model_validator(mode="after")
    def _reads_the_mode(self) -> Grpo:
        if self.vllm_mode != "colocate" and not self.use_vllm:
            raise ValueError("vllm_mode: only with use_vllm: true; remove it")
        return self
