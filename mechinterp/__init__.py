"""Find the circuit behind a transformer's behaviour, prove it causally, cut away the rest.

The public names are flat: ``import mechinterp as mi``, then ``mi.load_model()``,
``mi.load_task("ioi", model)``, ``mi.activation_patching(model, task, "z")``. They are loaded
when first used, so importing the package costs nothing.
"""

import sys
from importlib import import_module
from types import ModuleType

from mechinterp._version import __version__ as __version__

_HOME = {
    "mechinterp.activations": ["Activations"],
    "mechinterp.catalogue": ["SiteCatalogue", "sites"],
    "mechinterp.causal.ablation": [
        "ablation_cells",
        "head_ablation",
        "mlp_ablation",
        "neuron_ablation",
    ],
    "mechinterp.causal.ablation_result": ["AblationResult"],
    "mechinterp.causal.attribution": ["attribution_patching"],
    "mechinterp.causal.attribution_result": ["AttributionResult"],
    "mechinterp.causal.audit": ["audit"],
    "mechinterp.causal.audit_result": ["AuditResult"],
    "mechinterp.causal.patching": ["activation_patching", "patching_cells"],
    "mechinterp.causal.paths": ["path_patching"],
    "mechinterp.causal.patching_result": ["PatchingResult"],
    "mechinterp.causal.self_repair": ["self_repair"],
    "mechinterp.causal.self_repair_result": ["SelfRepair"],
    "mechinterp.causal.tracing": ["noise_corruption"],
    "mechinterp.cost": ["Cost", "cost"],
    "mechinterp.engine": [
        "Cell",
        "Plan",
        "SlowPathWarning",
        "cell_logits",
        "cell_metrics",
        "plan",
        "run_activations",
    ],
    "mechinterp.heads.attention": ["attention_patterns"],
    "mechinterp.heads.attention_result": ["AttentionPatterns"],
    "mechinterp.heads.composition": ["Composition", "composition"],
    "mechinterp.heads.dossier": ["induction_dossier"],
    "mechinterp.heads.dossier_account": ["InductionDossier"],
    "mechinterp.heads.healing": ["Healed", "HealingCurve", "heal"],
    "mechinterp.heads.importance": ["head_importance"],
    "mechinterp.heads.importance_result": ["HeadImportance"],
    "mechinterp.heads.pruning_curve": ["pruning_curve", "pruning_plan"],
    "mechinterp.heads.pruning_curve_result": ["PruningCurve"],
    "mechinterp.heads.knockout": ["KnockOut"],
    "mechinterp.heads.redundancy": ["redundancy_atlas"],
    "mechinterp.heads.redundancy_result": ["RedundancyAtlas"],
    "mechinterp.heads.pruning": ["prune_heads", "prune_neurons"],
    "mechinterp.heads.scores": ["head_scores"],
    "mechinterp.heads.scores_result": ["HeadScores"],
    "mechinterp.hooks": ["HookManager", "HookNotFiredError"],
    "mechinterp.lens.attribution": ["direct_logit_attribution"],
    "mechinterp.lens.attribution_result": ["DirectAttributionResult"],
    "mechinterp.lens.evaluation": ["LensEvaluation"],
    "mechinterp.lens.lens_result": ["LensResult"],
    "mechinterp.lens.logit_lens": ["logit_lens"],
    "mechinterp.lens.tuned": ["TunedLens"],
    "mechinterp.models": [
        "Verification",
        "fingerprint",
        "load_model",
        "random_init",
        "save_model",
        "unwrap",
        "verify",
    ],
    "mechinterp.models.known": ["KnownModel", "known_model"],
    "mechinterp.models.pruned.record": ["Pruning", "pruning_of"],
    "mechinterp.inference": ["FewPromptsWarning"],
    "mechinterp.nulls": ["random_heads"],
    "mechinterp.report.writing": ["report"],
    "mechinterp.results": ["Convention", "Result", "load_result"],
    "mechinterp.sites": ["MissingSiteError", "Site"],
    "mechinterp.sweeps.opened": ["SweepRun", "open_run"],
    "mechinterp.sweeps.run": ["run"],
    "mechinterp.tasks": [
        "Labelled",
        "Prompts",
        "Task",
        "Text",
        "load_task",
        "repeated_tokens",
        "tasks",
    ],
    "mechinterp.heads.few_shot": ["few_shot"],
    "mechinterp.heads.few_shot_result": ["FewShotResult"],
    "mechinterp.heads.function_vector": ["FunctionVector", "IndirectEffects"],
    "mechinterp.heads.function_vector_effect": ["FunctionVectorEffect"],
    "mechinterp.heads.function_vectors": ["function_vector"],
    "mechinterp.heads.icl": ["icl_score"],
    "mechinterp.heads.icl_result": ["IclResult"],
    "mechinterp.heads.training": ["training_curve"],
    "mechinterp.heads.training_result": ["TrainingCurve"],
    "mechinterp.tasks.pairs": ["Pairs", "load_pairs", "pair_names"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
_SUBMODULES = ["edits", "metrics", "stats"]

__all__ = sorted([*_MODULE_OF, *_SUBMODULES, "__version__"])


def __getattr__(name: str) -> object:
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    if name in _SUBMODULES:
        return import_module(f"mechinterp.{name}")
    raise AttributeError(f"module 'mechinterp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """Keeps ``mi.sites`` and ``mi.tasks`` the functions that their modules are named after.

    Importing ``mechinterp.sites`` would otherwise put the module in the function's place.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
