"""The order of samples: properties that hold for every mixture of lengths and modalities."""

import random
import statistics

import pytest
import torch

from convllava_hf.training.sampler import ModalityLengthSampler


# Numbers of samples with images and without, and samples of a step.
MIXTURES = [(0, 0, 4), (1, 0, 4), (3, 2, 8), (64, 0, 8), (0, 65, 8), (100, 30, 1), (203, 98, 8), (1000, 77, 16)]


def make_samples(images: int, texts: int, seed: int = 0) -> tuple[list[int], list[bool]]:
    """Lengths of a long-tailed distribution, and modalities, in random order."""
    rng = random.Random(seed)
    has_image = [True] * images + [False] * texts
    rng.shuffle(has_image)
    return [int(rng.lognormvariate(5, 1)) + 144 * image for image in has_image], has_image


def make_sampler(images: int, texts: int, batch: int, seed: int = 0) -> ModalityLengthSampler:
    return ModalityLengthSampler(*make_samples(images, texts), batch, seed)


SHAPES = [(8, 10), (8, 10), (8, 10), (10, 8), (10, 8), (9, 16), (27, 19), (12, 12), (3, 3), (5, 31), (16, 2)]


def make_shaped(images: int, texts: int, batch: int, seed: int = 0, shapes=SHAPES) -> ModalityLengthSampler:
    """Images of common shapes and of any, and lengths that hold their tokens."""
    rng = random.Random(seed)
    lengths, has_image = make_samples(images, texts, seed)
    drawn = [
        (0, 0) if not has else rng.choice([rng.choice(shapes), (rng.randint(4, 24), rng.randint(4, 24))])
        for has in has_image
    ]
    lengths = [length + rows * columns for length, (rows, columns) in zip(lengths, drawn, strict=True)]
    return ModalityLengthSampler(lengths, has_image, batch, seed, drawn)


def padding(sampler: ModalityLengthSampler, order: list[int], size: int) -> tuple[float, float]:
    """Tokens that are padding, as a part of those that are not: around images, and after texts."""
    shapes, lengths, padded, real = sampler.shapes, sampler.lengths, [0, 0], [0, 0]
    for batch in steps([index for index in order if sampler.has_image[index]], size):
        rows, columns = (max(shapes[index][axis] for index in batch) for axis in (0, 1))
        padded[0] += len(batch) * rows * columns
        padded[1] += len(batch) * max(lengths[index] for index in batch)
        real[0] += sum(shapes[index][0] * shapes[index][1] for index in batch)
        real[1] += sum(lengths[index] for index in batch)
    return padded[0] / real[0] - 1, padded[1] / real[1] - 1


def steps(order: list[int], batch: int) -> list[list[int]]:
    return [order[start : start + batch] for start in range(0, len(order), batch)]


def spread(lengths: list[int], batches: list[list[int]]) -> float:
    """How far apart the lengths within a batch are, on average."""
    return statistics.mean(statistics.pstdev([lengths[index] for index in batch]) for batch in batches)


@pytest.mark.parametrize("images, texts, batch", MIXTURES)
@pytest.mark.parametrize("seed, epoch", [(0, 0), (42, 3)])
def test_every_sample_comes_once_in_an_epoch(images, texts, batch, seed, epoch):
    sampler = make_sampler(images, texts, batch, seed)
    sampler.set_epoch(epoch)
    assert sorted(sampler) == list(range(images + texts))
    assert len(sampler) == images + texts


@pytest.mark.parametrize("images, texts, batch", MIXTURES)
@pytest.mark.parametrize("epoch", range(3))
def test_steps_are_of_one_modality_but_for_the_rest_at_the_end(images, texts, batch, epoch):
    sampler = make_sampler(images, texts, batch)
    sampler.set_epoch(epoch)
    whole = images // batch + texts // batch
    for number, step in enumerate(steps(list(sampler), batch)):
        kinds = {sampler.has_image[index] for index in step}
        assert len(kinds) == 1 or number >= whole
        assert len(step) == batch or number >= whole


@pytest.mark.parametrize("images, texts, batch", MIXTURES)
def test_the_order_depends_on_seed_and_epoch_alone(images, texts, batch):
    first = make_sampler(images, texts, batch, seed=7)
    first.set_epoch(2)
    order = list(first)
    second = make_sampler(images, texts, batch, seed=7)
    list(second)  # an epoch that went before leaves no trace
    torch.manual_seed(123)
    state = torch.get_rng_state()
    second.set_epoch(2)
    assert list(second) == order == list(first)
    assert torch.equal(torch.get_rng_state(), state)  # nor does the order draw from what the model draws from


def test_seeds_and_epochs_give_orders_of_their_own():
    orders = set()
    for seed in range(5):
        sampler = make_sampler(203, 98, 8, seed)
        for epoch in range(5):
            sampler.set_epoch(epoch)
            orders.add(tuple(sampler))
    assert len(orders) == 25


def test_batches_too_are_put_together_anew_each_epoch():
    sampler = make_sampler(203, 98, 8)
    first = {frozenset(step) for step in steps(list(sampler), 8)}
    sampler.set_epoch(1)
    assert len(first & {frozenset(step) for step in steps(list(sampler), 8)}) < len(first) / 4


@pytest.mark.parametrize("images, texts, batch", [(203, 98, 8), (1000, 77, 16), (5000, 1000, 32)])
def test_lengths_of_a_step_are_closer_than_by_chance(images, texts, batch):
    sampler = make_sampler(images, texts, batch)
    order = list(sampler)
    shuffled = random.Random(1).sample(order, len(order))
    assert spread(sampler.lengths, steps(order, batch)) < 0.5 * spread(sampler.lengths, steps(shuffled, batch))


def test_long_and_short_steps_come_in_no_order():
    sampler = make_sampler(4000, 0, 8)
    means = [statistics.mean(sampler.lengths[index] for index in step) for step in steps(list(sampler), 8)]
    ranks = sorted(range(len(means)), key=means.__getitem__)
    places = torch.tensor([ranks, range(len(ranks))], dtype=torch.float64)
    assert abs(torch.corrcoef(places)[0, 1]) < 0.15


@pytest.mark.parametrize("images, texts, batch", MIXTURES)
@pytest.mark.parametrize("epoch", [0, 3])
def test_with_shapes_too_every_sample_comes_once_in_steps_of_one_modality(images, texts, batch, epoch):
    sampler, again = make_shaped(images, texts, batch, 5), make_shaped(images, texts, batch, 5)
    list(again)
    for one in (sampler, again):
        one.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(images + texts)) and list(again) == order
    whole = images // batch + texts // batch
    for number, step in enumerate(steps(order, batch)):
        assert len({sampler.has_image[index] for index in step}) == 1 or number >= whole


@pytest.mark.parametrize("batch, device, around, after", [(64, 8, 0.2, 0.1), (16, 8, 0.25, 0.15), (8, 8, 0.25, 0.15)])
def test_little_is_padded_around_images_and_after_texts(batch, device, around, after):
    """Against by length alone, which leaves the shapes to chance, and by chance altogether."""
    sampler = make_shaped(6400, 500, batch)
    by_length = ModalityLengthSampler(sampler.lengths, sampler.has_image, batch, 0)
    of_shapes, of_texts = padding(sampler, list(sampler), device)
    of_shapes_by_length, _ = padding(sampler, list(by_length), device)
    chance = padding(sampler, random.Random(1).sample(range(6900), 6900), device)
    assert of_shapes < around * of_shapes_by_length < around * chance[0]
    assert of_texts < after * chance[1]


def test_images_of_one_shape_are_ordered_by_length_as_without_shapes():
    drawn = make_shaped(1000, 77, 16)
    shapes = [(12, 12) if has else (0, 0) for has in drawn.has_image]
    sampler = ModalityLengthSampler(drawn.lengths, drawn.has_image, 16, 0, shapes)
    plain = ModalityLengthSampler(sampler.lengths, sampler.has_image, 16, 0)
    assert list(sampler) == list(plain)


def test_batches_with_shapes_too_are_put_together_anew_each_epoch():
    sampler = make_shaped(406, 98, 8)
    first = {frozenset(step) for step in steps(list(sampler), 8)}
    sampler.set_epoch(1)
    assert len(first & {frozenset(step) for step in steps(list(sampler), 8)}) < len(first) / 4


def test_lengths_and_modalities_must_be_of_the_same_samples():
    with pytest.raises(ValueError, match="3 lengths, but 2 samples"):
        ModalityLengthSampler([1, 2, 3], [True, False], 2, 0)
    with pytest.raises(ValueError, match="1 shapes, but 2 samples"):
        ModalityLengthSampler([1, 2], [True, False], 2, 0, [(1, 1)])


@pytest.mark.parametrize("make", [make_sampler, make_shaped])
def test_processes_share_steps_and_change_the_order_together(make):
    """Through accelerate's data loader, as the Trainer prepares it for several processes."""
    data_loader = pytest.importorskip("accelerate.data_loader")
    per_device, processes = 4, 2
    sampler = make(204, 100, per_device * processes)
    whole = 204 // 8 + 100 // 8
    loaders = [
        data_loader.prepare_data_loader(
            torch.utils.data.DataLoader(range(304), batch_size=per_device, sampler=sampler),
            num_processes=processes,
            process_index=rank,
            put_on_device=False,
        )
        for rank in range(processes)
    ]
    orders = []
    for epoch in range(2):
        for loader in loaders:
            loader.set_epoch(epoch)
        shards = [[batch.tolist() for batch in loader] for loader in loaders]
        for step in list(zip(*shards, strict=True))[:whole]:
            assert len({sampler.has_image[index] for shard in step for index in shard}) == 1
        assert {index for shard in shards for batch in shard for index in batch} == set(range(304))
        orders.append(shards)
    assert orders[0] != orders[1]
