"""Progress of a trainer. Not in `progress`, which is imported before transformers is."""

from transformers import TrainerCallback

from .progress import OnStep


class TrainingProgressCallback(TrainerCallback):
    """Reports a training's steps and losses."""

    def __init__(self, on_step: OnStep):
        self.report = on_step

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:  # it goes on after an interruption
            self.report(state.global_step, state.max_steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.report(state.global_step, state.max_steps, float(logs["loss"]))

    def on_step_end(self, args, state, control, **kwargs):
        self.report(state.global_step, state.max_steps)
