import pytest
import torch

from data.perturb import (
    BLANK,
    PERTURBATIONS,
    Drop,
    Duplicate,
    Jitter,
    LocalShuffle,
    RandomPerturbation,
    Reverse,
    Shuffle,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def clip(*values):
    """One 2 x 2 frame of a single grey level per value."""
    return torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2).clone()


def levels(frames):
    return frames[:, 0, 0, 0].tolist()


def indices(perturbation, num_frames, seeds=200):
    g = generator()
    return [perturbation.index(num_frames, g).tolist() for _ in range(seeds)]


@pytest.mark.parametrize("kind", PERTURBATIONS)
@pytest.mark.parametrize("num_frames", [1, 2, 6])
def test_frames_follow_the_index_and_the_input_is_left_alone(kind, num_frames):
    frames = torch.randint(1, 256, (num_frames, 3, 4, 5), dtype=torch.uint8, generator=generator())
    before = frames.clone()
    for seed in range(20):
        index = PERTURBATIONS[kind]().index(num_frames, generator(seed)).tolist()
        perturbed = PERTURBATIONS[kind]()(frames, generator(seed))
        expected = [torch.zeros_like(before[0]) if i == BLANK else before[i] for i in index]
        assert torch.equal(perturbed, torch.stack(expected))
        perturbed += 1
        assert torch.equal(frames, before)


def test_shuffle_is_a_permutation():
    drawn = indices(Shuffle(), 6)
    assert all(sorted(index) == list(range(6)) for index in drawn)
    assert {index[0] for index in drawn} == set(range(6))


def test_local_shuffle_permutes_within_its_window():
    drawn = indices(LocalShuffle(window=4), 10)
    for index in drawn:
        assert [sorted(index[at : at + 4]) for at in (0, 4, 8)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert {index[0] for index in drawn} == {0, 1, 2, 3} and {index[8] for index in drawn} == {8, 9}


def test_reverse():
    assert levels(Reverse()(clip(1, 2, 3, 4), generator())) == [4, 3, 2, 1]


def test_jitter_stays_within_its_radius():
    drawn = indices(Jitter(radius=1), 5)
    reached = [set(places) for places in zip(*drawn)]
    assert reached == [{0, 1}, {0, 1, 2}, {1, 2, 3}, {2, 3, 4}, {3, 4}]
    assert {place for index in indices(Jitter(radius=2), 9) for place in [index[4]]} == {2, 3, 4, 5, 6}


def test_duplicate_freezes_one_frame_and_drops_as_many_others():
    copies = set()
    for index in indices(Duplicate(max_copies=3), 6):
        repeated = [i for i in set(index) if index.count(i) > 1]
        assert index == sorted(index) and len(index) == 6 and len(repeated) == 1
        copies.add(index.count(repeated[0]) - 1)
    assert copies == {1, 2, 3}


def test_drop_blanks_one_to_three_frames_and_leaves_the_rest():
    blanked = set()
    for index in indices(Drop(max_frames=3), 6):
        assert all(i in (place, BLANK) for place, i in enumerate(index))
        blanked.add(index.count(BLANK))
    assert blanked == {1, 2, 3}
    assert {index.count(BLANK) for index in indices(Drop(max_frames=3), 3)} == {1, 2}  # never all


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LocalShuffle(window=1), "window must be a whole number of at least 2, got 1"),
        (lambda: Jitter(radius=0), "radius must be a whole number of at least 1"),
        (lambda: Duplicate(max_copies=0), "max_copies"),
        (lambda: Drop(max_frames=1.5), "max_frames"),
        (lambda: RandomPerturbation(["shuffle", "blur"]), "kinds must be some of shuffle, .*'blur'"),
        (lambda: RandomPerturbation([]), "kinds must be some of"),
    ],
)
def test_bad_arguments_are_refused_by_name(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_random_perturbation_always_changes_a_clip_that_can_change():
    clips = [clip(1, 2), clip(1, 1, 1, 1, 1, 2), clip(3, 1, 2, 1, 3), clip(0, 0, 0, 9), clip(*range(12))]
    for frames in clips:
        for seed in range(60):
            before = frames.clone()
            perturbed, kind = RandomPerturbation()(frames, generator(seed))
            assert kind in PERTURBATIONS and perturbed.shape == frames.shape
            assert not torch.equal(perturbed, before) and torch.equal(frames, before)


def test_random_perturbation_draws_every_kind_alike_and_reports_it():
    frames, counts = clip(*range(1, 9)), dict.fromkeys(PERTURBATIONS, 0)
    g = generator()
    for _ in range(1200):
        perturbed, kind = RandomPerturbation()(frames, g)
        counts[kind] += 1
        assert (0 in levels(perturbed)) == (kind == "drop")
        if kind in ("shuffle", "local-shuffle", "reverse"):
            assert sorted(levels(perturbed)) == levels(frames)
    assert all(abs(count - 200) < 65 for count in counts.values())  # five standard deviations of a count


def test_random_perturbation_falls_back_to_a_kind_that_changes_the_clip():
    palindrome = clip(1, 2, 1)
    kinds = {RandomPerturbation(["reverse", "drop"])(palindrome, generator(seed)).kind for seed in range(20)}
    assert kinds == {"drop"}
    assert RandomPerturbation(["reverse"])(palindrome, generator()).kind is None


def test_random_perturbation_repeats_a_draw_that_changes_nothing():
    # Jitter leaves two frames as they are in 4 of 9 draws; eight such draws in a row are one case in 650.
    kinds = [RandomPerturbation(["jitter"])(clip(1, 2), generator(seed)).kind for seed in range(60)]
    assert kinds.count(None) <= 2


@pytest.mark.parametrize("frames", [clip(7), clip(7, 7, 7, 7), clip(0, 0)])
def test_a_clip_without_change_in_time_is_unperturbable(frames):
    for seed in range(30):
        perturbed, kind = RandomPerturbation()(frames, generator(seed))
        assert kind is None and torch.equal(perturbed, frames)


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_clips_are_perturbed_by_the_kind_of_their_frames_each_by_its_own_draws(kind):
    clips = torch.stack([clip(*range(1, 9)), clip(*range(11, 19)), clip(*[7] * 8), clip(*range(21, 29))])
    before, perturbation, g = clips.clone(), RandomPerturbation([kind]), generator(5)
    copies = perturbation.same_kind(kind, clips, g)
    assert torch.equal(clips, before) and copies.shape == clips.shape and copies.dtype == torch.uint8
    assert torch.equal(copies[2], clips[2])
    redrawn = generator(5)
    for k in (0, 1, 3):
        expected = clips[k]
        while torch.equal(expected, clips[k]):
            expected = PERTURBATIONS[kind]()(clips[k], redrawn)
        assert torch.equal(copies[k], expected)
        assert (0 in levels(copies[k])) == (kind == "drop") and set(levels(copies[k])) <= {0, *levels(clips[k])}
    assert torch.equal(g.get_state(), redrawn.get_state())
    if kind == "shuffle":
        places = [[level % 10 for level in levels(copies[k])] for k in (0, 1, 3)]
        assert places[0] != places[1] != places[2]


def test_clips_of_frames_that_were_not_perturbed_and_clips_that_no_draw_changes_stay():
    clips = torch.stack([clip(1, 2, 1), clip(3, 4, 5)])
    assert torch.equal(RandomPerturbation().same_kind(None, clips, generator()), clips)
    copies = RandomPerturbation(["reverse"]).same_kind("reverse", clips, generator())
    assert [levels(copy) for copy in copies] == [[1, 2, 1], [5, 4, 3]]


def test_a_draw_that_changes_nothing_is_repeated_for_clips_too():
    clips = clip(1, 2).expand(60, -1, -1, -1, -1)
    copies = RandomPerturbation(["jitter"]).same_kind("jitter", clips, generator())
    assert (copies == clips).flatten(1).all(1).sum() <= 2  # one in 650, as above


def test_random_perturbation_is_a_function_of_the_generator():
    frames = torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8, generator=generator())
    for seed in range(20):
        first, second = (RandomPerturbation()(frames, generator(seed)) for _ in range(2))
        assert first.kind == second.kind and torch.equal(first.frames, second.frames)
