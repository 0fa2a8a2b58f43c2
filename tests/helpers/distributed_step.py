"""Two training steps with sharded weights, started by torchrun in two processes; in each step one has an image.

    torchrun --nproc_per_node 2 distributed_step.py KIND FOLDER

KIND: `fsdp2` (torch's `fully_shard`), `zero2` or `zero3` (DeepSpeed). The same steps are made without sharding, on
both batches. The first process writes `told.json` into FOLDER, and the sharded model afterwards as a checkpoint.
"""

import copy
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist


sys.path.insert(0, str(Path(__file__).parents[1]))  # a script of its own finds only its own folder's modules

from helpers.tiny_models import make_image, make_model, make_processor  # noqa: E402


TEXTS = (
    "<s>USER: <image>\nWhat is it? ASSISTANT: A sign on a wall.</s>",
    "<s>USER: Hello. ASSISTANT: Good day to you, and to yours.</s>",
)
RATE = 0.1


def make_batch(image: bool) -> dict:
    images = [make_image()] if image else None
    inputs = make_processor()(text=TEXTS[0 if image else 1], images=images, return_tensors="pt")
    labels = inputs["input_ids"].clone()
    labels[:, :20] = -100
    return {**inputs, "labels": labels}


def loss_of(model, batch: dict, fused: bool) -> torch.Tensor:
    """The loss of the model itself, or TRL's, which never builds all logits."""
    return model(**batch, **({"fused_lm_head": True} if fused else {})).loss


def unsharded_step(model, optimizer, fused: bool) -> tuple[dict, dict, list[float]]:
    """Gradients, weights after a step and losses of one process that has both batches."""
    losses = [loss_of(model, make_batch(image), fused) for image in (True, False)]
    optimizer.zero_grad()
    (sum(losses) / 2).backward()
    gradients = {name: one.grad.clone() for name, one in model.named_parameters()}
    optimizer.step()
    weights = {name: one.detach().clone() for name, one in model.named_parameters()}
    return gradients, weights, [loss.item() for loss in losses]


def has_image(step: int) -> bool:
    """Whether this process has the image: in the first step the first one, in the second step the second."""
    return dist.get_rank() == step


def prepared(checkpointed: bool, fused: bool):
    model = make_model().train()
    if checkpointed:
        model.gradient_checkpointing_enable()
    reference = copy.deepcopy(model)
    if fused:
        from trl.trainer.utils import add_fused_lm_head

        for one in (model, reference):
            add_fused_lm_head(one)
    return model, reference


def furthest(ours: dict, theirs: dict) -> float:
    """The largest difference, relative to the largest value of the tensor that it is in."""
    assert ours.keys() == theirs.keys()
    sizes = {name: tensor.abs().max().item() for name, tensor in theirs.items()}
    assert all(sizes.values()), "a tensor of zeros shows nothing"
    return max((ours[name] - theirs[name]).abs().max().item() / size for name, size in sizes.items())


def evaluated(model, reference, fused: bool) -> list[float]:
    """This process's losses in evaluation, with and without sharding; here, too, an image is on one alone."""
    model.eval()
    reference.eval()
    with torch.no_grad():
        return [loss_of(one, make_batch(has_image(0)), fused).item() for one in (model, reference)]


def fsdp2_steps(checkpointed: bool, fused: bool):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model, reference = prepared(checkpointed, fused)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layers = {*model._no_split_modules, *model.language_model._no_split_modules}
    wrapped = [module for module in model.modules() if type(module).__name__ in layers]
    for module in [*wrapped, model]:
        fully_shard(module, mesh=mesh)
    told = {
        "wrapper": type(model).__mro__[1].__name__,
        "layers": len(wrapped),
        "sharded": all(isinstance(one, DTensor) for one in model.parameters()),
        "steps": [],
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    other = torch.optim.SGD(reference.parameters(), lr=RATE)
    for step in range(2):
        gradients, weights, losses = unsharded_step(reference, other, fused)
        loss = loss_of(model, make_batch(has_image(step)), fused)
        optimizer.zero_grad()
        loss.backward()
        found = {name: one.grad.full_tensor() for name, one in model.named_parameters()}
        optimizer.step()
        after = {name: one.full_tensor().detach() for name, one in model.named_parameters()}
        told["steps"].append(compared(loss, losses, step, found, gradients, after, weights))
    told["evaluated"] = evaluated(model, reference, fused)
    return told, model, get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def deepspeed_steps(stage: int, checkpointed: bool):
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    model, reference = prepared(checkpointed, fused=False)
    other = torch.optim.SGD(reference.parameters(), lr=RATE)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    told = {
        "wrapper": type(engine).__name__,
        "stage": engine.zero_optimization_stage(),
        "optimizer": type(engine.optimizer).__name__,
        "sharded": all(one.numel() == 0 for one in model.parameters()),
        "steps": [],
    }
    for step in range(2):
        gradients, weights, losses = unsharded_step(reference, other, fused=False)
        loss = loss_of(engine, make_batch(has_image(step)), fused=False)
        engine.backward(loss)
        found = {name: safe_get_full_grad(one) for name, one in model.named_parameters()}
        engine.step()
        after = {name: safe_get_full_fp32_param(one).detach() for name, one in model.named_parameters()}
        told["steps"].append(compared(loss, losses, step, found, gradients, after, weights))
    told["evaluated"] = evaluated(engine, reference, fused=False)
    return told, model, engine._zero3_consolidated_16bit_state_dict() if stage == 3 else model.state_dict()


def compared(loss, losses, step, gradients, expected_gradients, weights, expected_weights) -> dict:
    return {
        "image": has_image(step),
        "loss": [loss.item(), losses[0 if has_image(step) else 1]],
        "gradients": furthest(gradients, expected_gradients),
        "weights": furthest(weights, expected_weights),
    }


def main(kind: str, folder: Path) -> None:
    if kind == "fsdp2":
        dist.init_process_group("gloo")
        variants = [fsdp2_steps(checkpointed, fused) for checkpointed in (False, True) for fused in (False, True)]
    else:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
        variants = [deepspeed_steps(int(kind[-1]), checkpointed) for checkpointed in (False, True)]
    _, model, state = variants[0]
    each = [None, None]
    dist.all_gather_object(each, [told for told, _, _ in variants])
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "model", state_dict=state)
        make_processor().save_pretrained(folder / "model")
        told = {"world": dist.get_world_size(), "backend": dist.get_backend(), "ranks": each}
        (folder / "told.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
