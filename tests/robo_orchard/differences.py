"""What behaves otherwise than in RoboOrchardLab 0.4.0: a row each, with the test that shows it."""

from typing import NamedTuple


class Row(NamedTuple):
    """A difference: what it does, what gradclip does, and the test of that."""

    theirs: str
    ours: str
    test: str


_HOOKS = "tests/unit/pipeline/hooks"
_CHECKPOINTS = "tests/unit/pipeline/checkpoint"

ROWS = [
    Row(
        "a run that resumes begins one step early, with the epoch's first batches",
        "it goes on with the next batch, bit for bit",
        f"{_CHECKPOINTS}/test_resume.py::test_it_goes_on_bit_for_bit_from_every_checkpoint",
    ),
    Row(
        "checkpoints are `checkpoint_<n>`, and Accelerate's",
        "`epoch-<n>-step-<n>`, with a manifest; those of RoboOrchardLab are resumed from, exactly "
        "at an epoch's end, and with the sampler's seed inside one",
        "tests/robo_orchard/test_scripts.py::test_a_checkpoint_that_it_wrote_goes_on_bit_for_bit",
    ),
    Row(
        "a run that `max_step` ends inside an epoch counts that epoch as done",
        "it does not, and a longer run goes on inside the epoch",
        "tests/unit/pipeline/test_trainer.py::test_max_step_counts_batches_over_epochs",
    ),
    Row(
        "`resume_from` may be a URL",
        "a folder; a URL is an error that says so",
        f"{_CHECKPOINTS}/test_resuming.py::test_a_checkpoint_on_another_machine_is_refused",
    ),
    Row(
        "`total_limit` of the accelerator says how many checkpoints stay",
        "likewise where the accelerator names them (`automatic_checkpoint_naming`), and "
        "`keep_last` (3) elsewhere; never those of another run",
        f"{_HOOKS}/test_save_checkpoint.py::"
        "test_where_accelerate_names_checkpoints_its_limit_counts",
    ),
    Row(
        "with `automatic_checkpoint_naming` it warns and ignores `save_root`",
        "`save_root` says where checkpoints go, if it is given",
        f"{_HOOKS}/test_save_checkpoint.py::test_a_root_that_is_given_is_taken_in_any_case",
    ),
    Row(
        "`save_model`, `cache_dir`, `safe_serialization`",
        "accepted, with a warning that they do nothing",
        f"{_HOOKS}/test_save_checkpoint.py::"
        "test_what_does_nothing_is_accepted_and_workers_that_stay_are_warned_of",
    ),
    Row(
        "`register_save_state_pre_hook`: may take over the saving of a model",
        "called, and may write files; to take a model away is an error",
        f"{_HOOKS}/test_save_checkpoint.py::"
        "test_functions_that_run_before_models_are_saved_and_loaded_are_called",
    ),
    Row(
        "`register_for_checkpointing` keeps objects by pickling",
        "refused when the run begins: a hook with `state_dict()` keeps such state",
        f"{_HOOKS}/test_save_checkpoint.py::test_what_cannot_be_saved_is_known_before_the_first_step",
    ),
    Row(
        "the state of hooks is not saved",
        "saved and loaded; arrays, sets, deques, paths and times too; another object is refused "
        "when the run begins",
        f"{_HOOKS}/test_save_checkpoint.py::"
        "test_hooks_keep_plain_kinds_and_what_is_none_is_refused_before_the_first_step",
    ),
    Row(
        "the same script run again overwrites or fails at its checkpoints",
        'refused before the first step; `resume_from="auto"` starts or resumes',
        f"{_CHECKPOINTS}/test_resuming.py::test_a_finished_run_is_not_overwritten",
    ),
    Row(
        "validation with both frequencies evaluates after every step",
        "after every so many steps, and after every so many epochs",
        f"{_HOOKS}/test_validation_hook.py::test_it_evaluates_every_so_many_steps_and_epochs",
    ),
    Row(
        "the optimizer steps after an error in a hook",
        "nothing steps after an error",
        "tests/unit/pipeline/test_after_errors.py::test_nothing_steps_on_what_a_failure_left_of_a_window",
    ),
    Row(
        "the order of clipping and optimizer hook matters, and two clipping hooks clip twice",
        "the order does not matter; two are an error",
        "tests/unit/pipeline/test_trainer.py::"
        "test_bad_arguments_are_refused_before_anything_is_prepared",
    ),
    Row(
        "the limits of the clipping hook may be set during the run (`hook.max_norm = 2`)",
        "likewise; what would change nothing, such as `clip_value` of a norm, is an error",
        "tests/unit/pipeline/test_expected_of_hooks.py::"
        "test_a_limit_may_be_set_on_the_clipping_hook",
    ),
    Row(
        "with `step_scheduler_with_optimizer=False` the scheduler steps with every batch",
        "likewise, with a warning where gradients accumulate; not with a step that was withheld",
        "tests/unit/pipeline/test_trainer.py::"
        "test_the_scheduler_follows_the_accelerator_in_a_window",
    ),
    Row(
        "a NaN in the gradients goes into the weights",
        "the step is withheld, and said",
        "tests/unit/clipping/step/test_first_skip.py::test_the_first_skip_is_said_once",
    ),
    Row(
        "the time left, after a resume, counts the steps before it twice",
        "it counts what is left",
        f"{_HOOKS}/test_trackers.py::test_the_time_left_is_right_in_a_run_that_resumes",
    ),
    Row(
        "`LossTracker` averages losses over processes, and reads them, at every step; a loss that "
        "is not a scalar gives a warning each time",
        "it does so when it logs, so `cached_loss` has the losses of this process; of such a loss "
        "the mean is taken without a warning",
        f"{_HOOKS}/test_trackers.py::test_losses_are_logged_as_means_since_the_last_log",
    ),
    Row(
        "`MetricTracker` without `update_metric` tracks nothing, silently",
        "an error",
        f"{_HOOKS}/test_trackers.py::"
        "test_a_metric_without_names_and_a_tracker_without_its_method_are_refused",
    ),
    Row(
        "`SaveModel`, `ClearCacheHook`",
        "not here: the import says what to use",
        "tests/unit/pipeline/test_simple_trainer.py::test_names_that_are_left_out_say_what_to_use",
    ),
    Row(
        "configurations take a number as text, and change",
        "strict and frozen; `replace()` makes a changed copy",
        "tests/unit/config/test_config.py::test_a_float_is_a_finite_number_and_nothing_that_looks_like_one",
    ),
]


def table() -> str:
    """Return the rows as a table."""
    lines = ["| RoboOrchardLab 0.4.0 | gradclip |", "|---|---|"]
    return "\n".join([*lines, *(f"| {row.theirs} | {row.ours} |" for row in ROWS)])
