"""What a trainer tells while it trains. Apart from `progress`, which is there before transformers is imported."""

from transformers import TrainerCallback

from .progress import OnStep


class TrainingProgressCallback(TrainerCallback):
    """Tells of a training's steps and losses."""

    def __init__(self, tell: OnStep):
        self.tell = tell

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:  # it goes on after an interruption
            self.tell(state.global_step, state.max_steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.tell(state.global_step, state.max_steps, float(logs["loss"]))

    def on_step_end(self, args, state, control, **kwargs):
        self.tell(state.global_step, state.max_steps)
