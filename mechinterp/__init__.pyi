"""The public names for type checkers and editors; ``__init__.py`` loads them lazily."""

from mechinterp import edits as edits
from mechinterp import metrics as metrics
from mechinterp import stats as stats
from mechinterp._version import __version__ as __version__
from mechinterp.activations import Activations as Activations
from mechinterp.catalogue import SiteCatalogue as SiteCatalogue
from mechinterp.catalogue import sites as sites
from mechinterp.causal.ablation import ablation_cells as ablation_cells
from mechinterp.causal.ablation import head_ablation as head_ablation
from mechinterp.causal.ablation import mlp_ablation as mlp_ablation
from mechinterp.causal.ablation import neuron_ablation as neuron_ablation
from mechinterp.causal.ablation_result import AblationResult as AblationResult
from mechinterp.causal.attribution import attribution_patching as attribution_patching
from mechinterp.causal.attribution_result import AttributionResult as AttributionResult
from mechinterp.causal.audit import audit as audit
from mechinterp.causal.audit_result import AuditResult as AuditResult
from mechinterp.causal.patching import activation_patching as activation_patching
from mechinterp.causal.patching import patching_cells as patching_cells
from mechinterp.causal.patching_result import PatchingResult as PatchingResult
from mechinterp.causal.paths import path_patching as path_patching
from mechinterp.causal.self_repair import self_repair as self_repair
from mechinterp.causal.self_repair_result import SelfRepair as SelfRepair
from mechinterp.causal.tracing import noise_corruption as noise_corruption
from mechinterp.cost import Cost as Cost
from mechinterp.cost import cost as cost
from mechinterp.engine import Cell as Cell
from mechinterp.engine import Plan as Plan
from mechinterp.engine import SlowPathWarning as SlowPathWarning
from mechinterp.engine import cell_logits as cell_logits
from mechinterp.engine import cell_metrics as cell_metrics
from mechinterp.engine import plan as plan
from mechinterp.engine import run_activations as run_activations
from mechinterp.heads.attention import attention_patterns as attention_patterns
from mechinterp.heads.attention_result import AttentionPatterns as AttentionPatterns
from mechinterp.heads.composition import Composition as Composition
from mechinterp.heads.composition import composition as composition
from mechinterp.heads.dossier import induction_dossier as induction_dossier
from mechinterp.heads.dossier_account import InductionDossier as InductionDossier
from mechinterp.heads.few_shot import few_shot as few_shot
from mechinterp.heads.few_shot_result import FewShotResult as FewShotResult
from mechinterp.heads.function_vector import FunctionVector as FunctionVector
from mechinterp.heads.function_vector import IndirectEffects as IndirectEffects
from mechinterp.heads.function_vector_effect import FunctionVectorEffect as FunctionVectorEffect
from mechinterp.heads.function_vectors import function_vector as function_vector
from mechinterp.heads.healing import Healed as Healed
from mechinterp.heads.healing import HealingCurve as HealingCurve
from mechinterp.heads.healing import heal as heal
from mechinterp.heads.icl import icl_score as icl_score
from mechinterp.heads.icl_result import IclResult as IclResult
from mechinterp.heads.importance import head_importance as head_importance
from mechinterp.heads.importance_result import HeadImportance as HeadImportance
from mechinterp.heads.knockout import KnockOut as KnockOut
from mechinterp.heads.pruning import prune_heads as prune_heads
from mechinterp.heads.pruning import prune_neurons as prune_neurons
from mechinterp.heads.pruning_curve import pruning_curve as pruning_curve
from mechinterp.heads.pruning_curve import pruning_plan as pruning_plan
from mechinterp.heads.pruning_curve_result import PruningCurve as PruningCurve
from mechinterp.heads.redundancy import redundancy_atlas as redundancy_atlas
from mechinterp.heads.redundancy_result import RedundancyAtlas as RedundancyAtlas
from mechinterp.heads.scores import head_scores as head_scores
from mechinterp.heads.scores_result import HeadScores as HeadScores
from mechinterp.heads.training import training_curve as training_curve
from mechinterp.heads.training_result import TrainingCurve as TrainingCurve
from mechinterp.hooks import HookManager as HookManager
from mechinterp.hooks import HookNotFiredError as HookNotFiredError
from mechinterp.inference import FewPromptsWarning as FewPromptsWarning
from mechinterp.lens.attribution import direct_logit_attribution as direct_logit_attribution
from mechinterp.lens.attribution_result import (
    DirectAttributionResult as DirectAttributionResult,
)
from mechinterp.lens.evaluation import LensEvaluation as LensEvaluation
from mechinterp.lens.lens_result import LensResult as LensResult
from mechinterp.lens.logit_lens import logit_lens as logit_lens
from mechinterp.lens.tuned import TunedLens as TunedLens
from mechinterp.models import Verification as Verification
from mechinterp.models import fingerprint as fingerprint
from mechinterp.models import load_model as load_model
from mechinterp.models import random_init as random_init
from mechinterp.models import save_model as save_model
from mechinterp.models import unwrap as unwrap
from mechinterp.models import verify as verify
from mechinterp.models.known import KnownModel as KnownModel
from mechinterp.models.known import known_model as known_model
from mechinterp.models.pruned.record import Pruning as Pruning
from mechinterp.models.pruned.record import pruning_of as pruning_of
from mechinterp.nulls import random_heads as random_heads
from mechinterp.report.writing import report as report
from mechinterp.results import Convention as Convention
from mechinterp.results import Result as Result
from mechinterp.results import load_result as load_result
from mechinterp.sites import MissingSiteError as MissingSiteError
from mechinterp.sites import Site as Site
from mechinterp.sweeps.opened import SweepRun as SweepRun
from mechinterp.sweeps.opened import open_run as open_run
from mechinterp.sweeps.run import run as run
from mechinterp.tasks import Labelled as Labelled
from mechinterp.tasks import Prompts as Prompts
from mechinterp.tasks import Task as Task
from mechinterp.tasks import Text as Text
from mechinterp.tasks import load_task as load_task
from mechinterp.tasks import repeated_tokens as repeated_tokens
from mechinterp.tasks import tasks as tasks
from mechinterp.tasks.pairs import Pairs as Pairs
from mechinterp.tasks.pairs import load_pairs as load_pairs
from mechinterp.tasks.pairs import pair_names as pair_names

__all__ = [
    "AblationResult",
    "Activations",
    "AttributionResult",
    "AuditResult",
    "Cell",
    "Composition",
    "Convention",
    "Cost",
    "DirectAttributionResult",
    "FewPromptsWarning",
    "FewShotResult",
    "FunctionVector",
    "FunctionVectorEffect",
    "HeadImportance",
    "HeadScores",
    "Healed",
    "HealingCurve",
    "HookManager",
    "HookNotFiredError",
    "IclResult",
    "IndirectEffects",
    "InductionDossier",
    "KnockOut",
    "KnownModel",
    "Labelled",
    "LensEvaluation",
    "LensResult",
    "MissingSiteError",
    "Pairs",
    "PatchingResult",
    "Plan",
    "Prompts",
    "Pruning",
    "PruningCurve",
    "RedundancyAtlas",
    "Result",
    "SelfRepair",
    "Site",
    "SiteCatalogue",
    "SlowPathWarning",
    "SweepRun",
    "Task",
    "Text",
    "TrainingCurve",
    "TunedLens",
    "Verification",
    "ablation_cells",
    "activation_patching",
    "attribution_patching",
    "audit",
    "cell_logits",
    "cell_metrics",
    "composition",
    "cost",
    "direct_logit_attribution",
    "edits",
    "few_shot",
    "fingerprint",
    "function_vector",
    "head_ablation",
    "head_importance",
    "head_scores",
    "heal",
    "icl_score",
    "induction_dossier",
    "known_model",
    "load_model",
    "load_pairs",
    "load_result",
    "load_task",
    "logit_lens",
    "metrics",
    "mlp_ablation",
    "neuron_ablation",
    "noise_corruption",
    "open_run",
    "pair_names",
    "patching_cells",
    "path_patching",
    "plan",
    "prune_heads",
    "prune_neurons",
    "pruning_curve",
    "pruning_of",
    "pruning_plan",
    "random_heads",
    "random_init",
    "redundancy_atlas",
    "repeated_tokens",
    "run",
    "run_activations",
    "save_model",
    "self_repair",
    "sites",
    "stats",
    "tasks",
    "training_curve",
    "unwrap",
    "verify",
]
