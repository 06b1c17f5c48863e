"""The work of ``ditfast sample``: fixed batches, an image's own stream, shares of processes, settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ditfast.sampling.work import Batch, cut, differences, digest, image_generator, label_of, share, start

SHAPE = (4, 8, 4)


def test_batches_are_cut_from_the_number_of_images_alone() -> None:
    batches = cut(10, 4)
    assert batches == [Batch(0, 0, 4), Batch(1, 4, 4), Batch(2, 8, 2)]
    assert cut(4, 4) == batches[:1]
    assert cut(1, 4) == [Batch(0, 0, 1)]


@pytest.mark.parametrize(
    ("num", "size", "option"), [(0, 4, "--num"), (-1, 4, "--num"), (2**32 + 1, 4, "--num"), (4, 0, "--batch-size")]
)
def test_no_images_or_no_batch_is_refused(num: int, size: int, option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be .*, got {num if option == '--num' else size}"):
        cut(num, size)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_remaining_batches_are_shared_without_overlap(ranks: int) -> None:
    left = [batch for batch in cut(50, 4) if batch.index not in (0, 3, 4)]
    parts = [share(left, rank, ranks) for rank in range(ranks)]
    assert sorted((batch for part in parts for batch in part), key=lambda batch: batch.index) == left
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.quick
@pytest.mark.parametrize("classes", [None, [7, 3, 1]])
def test_an_image_starts_from_the_same_noise_in_any_batch(classes: list[int] | None) -> None:
    whole = start(Batch(0, 0, 11), 5, classes, 10, SHAPE)
    for size in (1, 3, 4):
        parts = [start(batch, 5, classes, 10, SHAPE) for batch in cut(11, size)]
        assert torch.equal(torch.cat([part.noise for part in parts]), whole.noise)
        assert [label for part in parts for label in part.labels] == whole.labels
        # later draws of a sampler, too
        later = [torch.randn(3, generator=g) for part in parts for g in part.generators]
        assert torch.equal(torch.stack(later)[-1], torch.randn(3, generator=_after_start(5, 10)))
    assert whole.labels == [label_of(image, 5, classes, 10) for image in range(11)]


def _after_start(seed: int, image: int) -> torch.Generator:
    generator = image_generator(seed, image)
    torch.randint(10, (1,), generator=generator)
    torch.randn(SHAPE, generator=generator)
    return generator


def test_the_label_is_drawn_first_and_given_ones_leave_the_noise_alone() -> None:
    drawn, with_classes = (start(Batch(0, 0, 6), 1, classes, 10, SHAPE) for classes in (None, [4, 2]))
    assert with_classes.labels == [4, 2, 4, 2, 4, 2]
    assert torch.equal(drawn.noise, with_classes.noise)
    generator = image_generator(1, 3)
    assert drawn.labels[3] == int(torch.randint(10, (1,), generator=generator))
    assert torch.equal(drawn.noise[3], torch.randn(SHAPE, generator=generator))


def test_labels_are_uniform_over_the_classes() -> None:
    counts = torch.bincount(torch.tensor([label_of(image, 0, None, 4) for image in range(4000)]), minlength=4)
    # five standard deviations of a binomial of 4000 draws at 1/4
    assert (counts - 1000).abs().max() < 5 * (4000 * 0.25 * 0.75) ** 0.5


def test_noise_is_standard_normal_and_differs_between_images_and_seeds() -> None:
    noise = torch.cat([start(Batch(0, 0, 500), seed, [0], 10, SHAPE).noise for seed in (0, 1, 2**40)])
    assert len({row.numpy().tobytes() for row in noise}) == 1500
    assert abs(noise.mean().item()) < 5 / noise.numel() ** 0.5
    assert abs(noise.var().item() - 1) < 5 * (2 / noise.numel()) ** 0.5
    flat = noise.flatten(1)
    neighbours = (flat[:-1] * flat[1:]).mean().item()
    assert abs(neighbours) < 5 / noise.numel() ** 0.5


def test_streams_of_a_run_never_meet() -> None:
    """torch's CPU generator uses 32 bits of its seed: more than that would make 2^32 apart the same."""
    low, high = (torch.Generator().manual_seed(seed) for seed in (7, 7 + 2**32))
    assert torch.equal(torch.randn(20, generator=low), torch.randn(20, generator=high))
    for seed in (0, 1, 2**31, 2**63):
        seeds = [image_generator(seed, image).initial_seed() for image in (*range(300), 2**31, 2**32 - 1)]
        assert len(set(seeds)) == 302
        assert all(0 <= value < 2**32 for value in seeds)


def test_a_digest_is_of_the_contents(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"weights" * 1000)
    two.write_bytes(b"weights" * 1000)
    assert digest([one]) == digest([two])
    assert digest([one])["bytes"] == 7000
    two.write_bytes(b"weights" * 999 + b"weightz")
    assert digest([one]) != digest([two])


def test_differences_name_both_values() -> None:
    assert differences({"seed": 0, "steps": 20}, {"seed": 0, "steps": 20}) == []
    lines = differences({"seed": 0, "steps": 20, "old": 1}, {"seed": 1, "steps": 20, "new": "x"})
    assert lines == ["seed 1 (there: 0)", 'new "x" (there: null)', "old null (there: 1)"]
