"""What requests tell of their size: learnt where it is there, no harm where it is not, and all of it bounded."""

import json
import random
import time
from math import exp

import pytest

from controlplane.sizes import BODY_BYTES, MOST_WORK, NAMES, Sizes

PATH = "/sdapi/v1/txt2img"


def body(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def learn(sizes: Sizes, request: bytes, times: float, path: str = PATH) -> None:
    features = sizes.features(path, request)
    if features is not None:
        sizes.learn(features, times)


def work_of(sizes: Sizes, request: bytes, path: str = PATH) -> float:
    features = sizes.features(path, request)
    return 1.0 if features is None else sizes.work(features)


def taught(count: int = 400, *, nested: bool = False) -> Sizes:
    """By tasks that take as long as steps times pixels, give or take a quarter."""
    sizes, chance = Sizes(), random.Random(1)
    for number in range(count):
        steps, side = chance.choice([10, 20, 40, 80]), chance.choice([512, 768, 1024])
        fields: dict[str, object] = {"steps": steps, "width": side, "height": side, "seed": number, "tiling": True}
        request = body(prompt="a cat", parameters=fields) if nested else body(prompt="a cat", **fields)
        learn(sizes, request, steps / 30 * (side / 768) ** 2 * exp(chance.gauss(0, 0.25)))
    return sizes


@pytest.mark.parametrize("nested", [False, True])
def test_work_follows_the_numbers_that_tell_it(nested: bool) -> None:
    sizes = taught(nested=nested)

    def work(steps: int, side: int) -> float:
        fields = {"steps": steps, "width": side, "height": side, "seed": 5}
        return work_of(sizes, body(prompt="a cat", parameters=fields) if nested else body(prompt="a cat", **fields))

    assert sizes.useful
    assert work(80, 768) / work(20, 768) == pytest.approx(4, rel=0.2)
    assert work(20, 1024) / work(20, 512) == pytest.approx(4, rel=0.2)


def test_work_is_one_on_average() -> None:
    sizes, chance = taught(), random.Random(2)
    works = []
    for number in range(300):
        side = chance.choice([512, 768, 1024])
        request = body(steps=chance.choice([10, 20, 40, 80]), width=side, height=side, seed=number, prompt="a cat")
        works.append(work_of(sizes, request))
    assert sum(works) / len(works) == pytest.approx(1, rel=0.25)


def test_length_of_a_text_and_path_tell_too() -> None:
    sizes, chance = Sizes(), random.Random(3)
    for _ in range(300):
        length = chance.choice([100, 400, 1600])
        learn(sizes, body(text="x" * length), length / 400 * exp(chance.gauss(0, 0.1)), "/speak")
        learn(sizes, body(text="x" * length), 0.1 * length / 400 * exp(chance.gauss(0, 0.1)), "/listen")
    long, short, quick = (
        work_of(sizes, body(text="x" * length), path)
        for length, path in ((1600, "/speak"), (100, "/speak"), (1600, "/listen"))
    )
    assert long > 5 * short
    assert long > 5 * quick


def test_numbers_that_tell_nothing_change_nothing() -> None:
    sizes, chance = Sizes(), random.Random(4)
    for _ in range(600):
        learn(sizes, body(seed=chance.randrange(1 << 31), steps=chance.randrange(1, 100)), exp(chance.gauss(0, 0.5)))
    assert not sizes.useful
    assert work_of(sizes, body(seed=7, steps=99)) == 1.0


def test_what_was_true_once_is_forgotten() -> None:
    sizes, chance = taught(300), random.Random(5)
    assert sizes.useful
    for number in range(400):
        request = body(prompt="a cat", steps=chance.choice([10, 80]), width=512, seed=number)
        learn(sizes, request, chance.lognormvariate(0, 0.5))
    assert not sizes.useful


def test_no_number_counts_for_more_than_is_bounded() -> None:
    sizes = taught()
    assert work_of(sizes, body(steps=10**300, width=1e300, height=-(10**4000))) <= MOST_WORK
    assert work_of(sizes, body(steps=0)) >= 1 / MOST_WORK


@pytest.mark.parametrize(
    "request_body",
    [
        b"",
        b"\x89PNG\r\n",
        b"[1, 2, 3]",
        b'{"steps": 20',
        b'{"steps": "many"}',
        b'{"steps": NaN}',
        b'{"a":' * 700 + b"1" + b"}" * 700,
        b'{"steps": 20, "image": "' + b"x" * BODY_BYTES + b'"}',
    ],
)
def test_requests_of_any_kind_do_no_harm(request_body: bytes) -> None:
    sizes = taught(100)
    features = sizes.features(PATH, request_body)
    assert features is not None
    assert 1 / MOST_WORK <= sizes.work(features) <= MOST_WORK
    sizes.learn(features, 1.0)


def test_strange_names_are_not_collected() -> None:
    sizes = Sizes()
    for number in range(1000):
        features = sizes.features(f"/{number}", body(**{f"field {number}": number, "x" * 1000: 1}))
        if features is not None:
            assert len(features) <= 1 + NAMES
            sizes.learn(features, 1.0)


def test_paths_with_ids_in_them_leave_room_for_numbers() -> None:
    sizes, chance = Sizes(), random.Random(6)
    for number in range(300):
        steps = chance.choice([10, 80])
        learn(sizes, body(steps=steps), steps / 30 * exp(chance.gauss(0, 0.1)), f"/jobs/{number}")
    assert work_of(sizes, body(steps=80), "/jobs/x") > 4 * work_of(sizes, body(steps=10), "/jobs/x")


def test_times_that_cannot_be_are_survived() -> None:
    sizes = Sizes()
    for times in (0.0, 1e300, 1e-300) * 50:
        learn(sizes, body(steps=20), times)
    assert 1 / MOST_WORK <= work_of(sizes, body(steps=20)) <= MOST_WORK


def test_a_task_costs_microseconds() -> None:
    sizes = taught()
    request = body(prompt="a cat", steps=20, width=768, height=768, seed=1)
    rounds = []
    for _ in range(10):
        begin = time.process_time()
        for _ in range(100):
            work_of(sizes, request)
            learn(sizes, request, 20 / 30)
        rounds.append((time.process_time() - begin) / 100)
    # About 30 us; the bound leaves room for a machine that is busy with other things.
    assert min(rounds) < 150e-6
