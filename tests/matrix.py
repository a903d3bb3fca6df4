"""Tests with many cases: `make test` runs those that are named here, `make test-matrix` the others.

Each of these tests shows one behaviour with several optimizers, modes or numbers of processes. The
cases that are named differ the most; the others cost minutes of processor time and fail together
with them, or are the first to fail only after a change of what they are named for. CI runs both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import pytest

MATRIX: dict[str, tuple[str, ...]] = {
    "test_activation_checkpointing::test_it_has_the_same_bits_as_without": (
        "1-{'moving_average': 0.9}",
        "2-{'batchnorm': 'sync'}",
    ),
    "test_best_measure::test_the_best_checkpoint_is_that_of_the_best_number_and_is_kept": (
        "test/found-max-3",
        "test/lost-min-2",
    ),
    "test_buffers::test_bitwise_keeps_their_bits": ("sum",),
    "test_buffers::test_they_do_not_depend_on_the_number_of_processes": ("mean",),
    "test_checkpoints::test_killed_at_any_operation_the_one_before_or_this_one_is_whole": (
        "asynchronous",
    ),
    "test_features::test_a_feature_does_not_depend_on_the_number_of_processes": (
        "BatchNorm, micro",
        "a stream, read whole",
        "all of it, bitwise",
        "augmentation in 2 loader workers",
        "dropout",
        "full batch (all rows a step)",
        "gradient clipping",
        "moving average of weights",
        "weights of tokens",
    ),
    "test_ignored_targets::test_a_step_and_a_test_are_divided_as_torch_divides": (
        "another ignored-1",
        "module-2",
        "named True True-2",
        "named-3",
        "nll-2",
        "weighted True-3",
        "weighted-3",
    ),
    "test_in_memory::test_the_run_is_the_same_to_the_bit": ("0-mappings", "2-pairs"),
    "test_launcher::test_a_run_goes_on_when_temporary_files_are_removed": ("True",),
    "test_launcher::test_a_save_slower_than_the_hang_timeout_is_no_hang": (
        "False-ranks0-3.0",
        "True-ranks1-2.0",
    ),
    "test_object_storage::test_a_run_that_is_killed_at_any_request_leaves_a_good_checkpoint": (
        "after",
    ),
    "test_object_storage::test_two_nodes_of_torchrun_go_on_with_the_same_bits_after_kills": (
        "sharded",
    ),
    "test_object_storage::"
    "test_two_nodes_without_a_shared_disk_go_on_with_the_same_bits_on_empty_disks": ("ddp",),
    "test_optimizer_packages::test_its_state_of_few_bits_is_saved_and_restored_to_the_bit": (
        "Adam8bit",
        "AdamWFp8",
    ),
    "test_optimizer_packages::test_schedulefree_trains_as_in_a_loop_by_hand": (
        "AdamWScheduleFree-options1",
    ),
    "test_optimizer_packages::test_what_an_optimizer_draws_is_the_same_on_every_process": (
        "TwoPasses",
    ),
    "test_optimizers::test_a_resume_in_the_middle_ends_in_the_same_bits": ("1-*",),
    "test_own_steps::test_the_number_of_processes_changes_nothing": (
        "noisy_update",
        "tokens",
        "vae",
    ),
    "test_own_tasks::test_data_that_is_drawn_without_a_seed_is_the_same_on_every_process": (
        "SplitWhenAsked",
    ),
    "test_own_tasks::test_random_numbers_not_from_torch_are_the_same_at_any_world_size": ("numpy",),
    "test_parameter_groups::test_a_group_may_be_frozen_for_ever_or_until_a_step_or_an_epoch": (
        "3-*",
    ),
    "test_parameter_groups::test_a_renamed_module_is_reported_and_can_be_mapped": ("adam",),
    "test_parameter_groups::test_another_order_in_the_models_code_does_not_break_a_resume": (
        "lbfgs",
    ),
    "test_precision::test_a_skipped_step_leaves_no_trace": (
        "decided by the host-3",
        "decided by the kernel, Adam-1",
        "decided by the kernel-3",
    ),
    "test_precision::test_fp16_skips_an_overflow_on_every_process_alike": ("3",),
    "test_precision::test_steps_without_any_gradient_are_logged_and_clipped": ("fp16",),
    "test_precision::test_stopped_and_resumed_it_ends_in_the_same_bits": ("fp16",),
    "test_sampling::test_the_rows_are_the_same_at_any_number_of_processes_and_after_a_resume": (
        "mixture-*",
        "task-arguments0",
    ),
    "test_schedules::"
    "test_what_a_schedule_remembers_is_in_the_checkpoint_at_any_number_of_processes": ("plateau",),
    "test_several_models::test_a_turn_is_skipped_by_itself": ("fp16",),
    "test_several_models::test_it_trains_as_a_hand_written_loop_at_any_world_size": (
        "byol",
        "gan",
    ),
    "test_several_models::test_state_that_a_constructor_makes_is_there_before_the_first_turn": (
        "*:Slow-unfreeze_at_step",
        "adagrad-every",
    ),
    "test_shapes::test_columns_and_flat_values_are_compared_one_by_one": (
        "binary_cross_entropy-2",
        "mean_squared-3",
    ),
    "test_sharded_device::test_a_micro_batch_that_fits_all_devices_is_found_and_trains": ("host",),
    "test_sharded_device::test_it_is_the_run_of_one_process_on_the_cpu": (
        "AdamW, clipped",
        "gradients summed after each micro-batch",
        "moving average, BatchNorm, early stopping",
    ),
    "test_sharded_device::test_offloaded_it_ends_in_the_same_bits": (
        "SGD, clipped by value, averaged",
        "fp16, BatchNorm, averaged",
    ),
    "test_sharded_steps::test_a_step_of_its_own_is_that_of_one_process": (
        "contrast",
        "noisy_update",
        "vae",
    ),
    "test_sharded_steps::test_several_models_train_as_in_a_hand_written_loop": ("gan",),
    "test_sharded_steps::test_stopped_and_resumed_it_ends_in_the_same_bits": ("gan",),
    "test_sharding::test_it_is_the_run_of_one_process": (
        "AdamW, clipped",
        "SGD, clipped by value",
        "groups, one frozen and one for a while",
        "moving average, BatchNorm, early stopping",
        "weights of rows, activations computed again",
    ),
    "test_sharding::test_nodes_without_a_shared_disk_save_on_the_first_one": ("hybrid-4-2",),
    "test_sharding::test_stopped_and_resumed_it_ends_in_the_same_bits": ("fp16, averaged",),
    "test_shared_saves::test_killed_at_an_operation_of_any_writer_a_checkpoint_is_whole": (
        "0-asynchronous",
    ),
    "test_simulated_device::test_a_run_on_a_device_is_the_run_on_the_cpu": (
        "LBFGS",
        "dropout and BatchNorm",
        "fp16",
        "rows held in memory",
        "weights of rows, waiting for each save",
    ),
    "test_simulated_device::test_several_devices_train_as_one_does": (
        "2-bitwise",
        "2-dropout and BatchNorm",
        "3-bf16",
    ),
    "test_streams::"
    "test_a_stream_gives_the_same_run_at_any_process_count_and_resumes_at_any_other": ("True",),
    "test_two_modes::test_no_test_and_no_save_and_no_resume_changes_a_bit_of_what_is_trained": (
        "3",
    ),
    "test_unusual_models::test_neither_the_number_of_processes_nor_a_stop_changes_anything": (
        "buffer_of_update-*",
        "late_draws-*",
        "random_update-*",
        "stream-arguments2",
    ),
}
"""The cases that `make test` runs of a test, as pytest names them; `*` stands for anything."""


def mark_further_cases(items: Iterable[pytest.Item], is_whole: bool) -> None:
    """Give the other cases of these tests the mark `matrix`.

    Raises `pytest.UsageError` if all tests were collected and a pattern names none or all of them.
    """
    found: dict[str, set[str]] = {name: set() for name in MATRIX}
    for item in items:
        function = f"{item.path.stem}::{getattr(item, 'originalname', item.name)}"
        if function in MATRIX:
            case = item.name.partition("[")[2].removesuffix("]")
            found[function].add(case)
            if not any(fnmatchcase(case, pattern) for pattern in MATRIX[function]):
                item.add_marker("matrix")
    if is_whole:
        _require(found)


def _require(found: Mapping[str, set[str]]) -> None:
    for function, patterns in MATRIX.items():
        cases = found[function]
        matched = {
            pattern: {case for case in cases if fnmatchcase(case, pattern)} for pattern in patterns
        }
        missing = [pattern for pattern in patterns if not matched[pattern]]
        if missing or set().union(*matched.values()) == cases:
            fault = f"none is {', '.join(missing)}" if missing else "none is left out"
            raise pytest.UsageError(
                f"tests/matrix.py: {function}: {fault}; its cases are {', '.join(sorted(cases))}"
            )
