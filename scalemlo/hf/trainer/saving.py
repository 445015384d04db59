"""The trainers' checkpoints, model cards and uploads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, trainer_pt_utils
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from ...distributed.group import is_main_process, world_size
from ...distributed.ranks import Ranks
from ...loop.program import Program
from ..models.saving import save_pretrained
from .callbacks import MLOCallbackHandler
from .config import MLOConfig
from .hub import Hub
from .model_card import model_card

STATE, ARGUMENTS, PROGRAM = "trainer_state.json", "training_args.json", "scalemlo"


class Saves:
    """The part of :class:`~scalemlo.hf.MLOTrainer` that saves, resumes and uploads."""

    args: MLOConfig
    program: Program
    model_level: str
    processing_class: Any
    model: Any
    state: TrainerState
    control: TrainerControl
    callback_handler: MLOCallbackHandler
    hub: Hub
    eval_dataset: Any
    _event: Callable[..., None]
    _last_metrics: Mapping[str, float]
    _last_saved = -1

    def save_model(self, output_dir: str | None = None) -> None:
        """Save the model, its tokenizer and the arguments; ``from_pretrained`` reads it. Collective.

        Args:
            output_dir: Where; by default ``args.output_dir``.
        """
        folder = Path(output_dir or self.args.output_dir)
        Ranks().on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
        save_pretrained(self.program, self.model_level, folder, self.processing_class)
        Ranks().on_main(lambda: (folder / ARGUMENTS).write_text(json.dumps(self.args.to_dict(), indent=2)))

    def _save_checkpoint(self) -> None:
        """Write ``checkpoint-<global_step>``, whole or not at all, and remove old ones."""
        args, state, ranks = self.args, self.state, Ranks()
        output = Path(args.output_dir)
        final, partial = (output / f"{prefix}checkpoint-{state.global_step}" for prefix in ("", "tmp-"))
        ranks.on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
        self.save_model(str(partial))
        if not args.save_only_model:
            self.program.save(partial / PROGRAM)
        if state.best_global_step == state.global_step:
            state.best_model_checkpoint = str(final)
        state.stateful_callbacks = _callback_states(self.callback_handler.callbacks, self.control)

        def complete() -> None:
            state.save_to_json(str(partial / STATE))
            shutil.rmtree(final, ignore_errors=True)
            os.rename(partial, final)
            rotate_checkpoints(str(output), args.save_total_limit, state.best_model_checkpoint)
            if args.push_to_hub:
                self.hub.push_save(final, state.global_step)

        ranks.on_main(complete)
        self._last_saved = state.global_step
        self._event("on_save")

    def _folder_to_resume(self, given: bool | str | None) -> Path | None:
        given = given if given is not None else self.args.resume_from_checkpoint
        if not given:
            return None
        folder = get_last_checkpoint(self.args.output_dir) if given is True else given
        if folder is None or not Path(folder).is_dir():
            raise ValueError(
                f"resume_from_checkpoint={given!r}: there is no checkpoint in {self.args.output_dir!r}; leave it out "
                "to start a run."
            )
        if not (Path(folder) / PROGRAM).is_dir():
            raise ValueError(
                f"resume_from_checkpoint={str(folder)!r} holds the model only (save_only_model=True); start a run from "
                "it with model=."
            )
        return Path(folder)

    def _load(self, folder: Path) -> None:
        self.program.load(folder / PROGRAM)
        self.state = TrainerState.load_from_json(str(folder / STATE))
        self.state.is_world_process_zero = self.is_world_process_zero()
        self.state.is_local_process_zero = self.is_local_process_zero()
        if self.args.restore_callback_states_from_checkpoint:
            kept = {k: [*v] if isinstance(v, list) else [v] for k, v in self.state.stateful_callbacks.items()}
            for callback in self.callback_handler.callbacks:
                states = kept.get(type(callback).__name__)
                if isinstance(callback, ExportableState) and states:
                    vars(callback).update(states.pop(0)["attributes"])
        self._last_saved = self.state.global_step

    def _new_state(self) -> TrainerState:
        return TrainerState(
            is_local_process_zero=self.is_local_process_zero(),
            is_world_process_zero=self.is_world_process_zero(),
            train_batch_size=self.args.per_device_train_batch_size,
        )

    def is_world_process_zero(self) -> bool:
        """Whether this process writes for all."""
        return is_main_process()

    def is_local_process_zero(self) -> bool:
        """Whether this process is the first on its machine."""
        return self.args.local_process_index == 0

    # What scripts call at their end; each needs no more than `args`, `state` and `is_world_process_zero`.
    log_metrics = trainer_pt_utils.log_metrics
    save_metrics = trainer_pt_utils.save_metrics
    save_state = trainer_pt_utils.save_state

    # ---- sharing -------------------------------------------------------------------------------------------------
    def create_model_card(self, model_name: str | None = None, tags: Sequence[str] = (), **extra: Any) -> None:
        """Write ``README.md`` into the output folder.

        Args:
            model_name: By default the folder's or the repository's.
            tags: For the hub.
            **extra: Further metadata (``language``, ``license``, ...).
        """
        if not is_main_process():
            return
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trainers = self.program.trainers
        text = model_card(
            name=model_name or (self.args.hub_model_id or folder.absolute().name).split("/")[-1],
            base_model=self._base_model(),
            is_adapter=isinstance(self.model, PeftModel),
            estimators={name: t.estimator for name, t in trainers.items() if self.program.graph.uppers(name)},
            data=self._describe_data(),
            hyperparameters=self._hyperparameters(),
            metrics={k: v for k, v in self._last_metrics.items() if isinstance(v, (int, float))},
            tags=list(tags),
            extra=extra,
        )
        (folder / "README.md").write_text(text)

    def push_to_hub(self, commit_message: str = "End of training", blocking: bool = True, **card: Any) -> Any:
        """Save the model and its card, and upload the output folder. Collective.

        Args:
            commit_message: Of the commit.
            blocking: Whether to wait for the upload.
            **card: As in :meth:`create_model_card`.

        Returns:
            The commit, or its future; None on other ranks than the first.
        """
        self._event("on_push_begin")
        self.save_model()
        self.create_model_card(**card)
        return Ranks().on_main(lambda: self.hub.push(commit_message, blocking=blocking))

    def _base_model(self) -> str | None:
        """The model's name on the hub; none of a folder, which readers of the card have not got."""
        name = getattr(getattr(self.model, "config", None), "_name_or_path", None)
        return name if name and not Path(name).is_dir() else None

    def _describe_data(self) -> dict[str, str]:
        sets = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else {"evaluation": self.eval_dataset}
        return {role: f"{len(part)} examples" for role, part in sets.items() if part is not None}

    def _hyperparameters(self) -> dict[str, Any]:
        found: dict[str, Any] = {"seed": self.args.seed, "steps": self.state.global_step, "processes": world_size()}
        for name, trainer in self.program.trainers.items():
            level, group = trainer.level, trainer.optimizer.param_groups[0]
            found[f"{name}: engine"] = repr(trainer.engine.spec)
            found[f"{name}: optimizer"] = type(trainer.optimizer).__name__
            found[f"{name}: learning rate"] = float(group.get("initial_lr", group["lr"]))
            found[f"{name}: batch size"] = self._examples_per_step(name) or "as its data gives"
            found[f"{name}: unroll steps"] = level.unroll_steps
        return found

    def _examples_per_step(self, name: str) -> int:
        """Examples of a step of a level; 0 where its data does not say."""
        level = self.program.trainers[name].level
        return (getattr(level.data, "batch_size", None) or 0) * level.gradient_accumulation_steps


def _callback_states(callbacks: Sequence[TrainerCallback], control: TrainerControl) -> Any:
    exportable: Any = [c for c in [*callbacks, control] if isinstance(c, ExportableState)]
    return TrainerState(stateful_callbacks=exportable).stateful_callbacks
