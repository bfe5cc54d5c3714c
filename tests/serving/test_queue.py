"""The order of requests: batches of one task, few switches, nobody left waiting."""

from hypothesis import given, settings
from hypothesis import strategies as st

from byom.serving.queue import Part, Queue, Ticket


def ticket(items, arrived, name=""):
    return Ticket([name] * items, arrived, lambda refusal: None)


def put(queue, task, items=1, arrived=0.0):
    made = ticket(items, arrived, task)
    queue.put(task, Part(made, list(range(items))))
    return made


def taken(queue, current, now):
    task, parts = queue.take(current, now)
    return task, [part.ticket.arrived for part in parts]


def test_requests_of_one_task_are_taken_together_up_to_the_batch_and_in_order():
    queue = Queue(batch=3, patience=9)
    for arrived in range(5):
        put(queue, "a", arrived=arrived)
    assert taken(queue, None, 5) == ("a", [0, 1, 2])
    assert taken(queue, "a", 5) == ("a", [3, 4]) and taken(queue, "a", 5) == ("a", [])


def test_the_current_task_goes_on_while_it_fills_batches_and_then_whoever_waited_longest():
    queue = Queue(batch=2, patience=9)
    put(queue, "b", arrived=0), put(queue, "c", arrived=1)
    for arrived in (2, 3, 4):
        put(queue, "a", arrived=arrived)
    assert taken(queue, "a", 5) == ("a", [2, 3])
    assert [taken(queue, current, 5)[0] for current in "abc"] == ["b", "c", "a"]


def test_a_task_that_waited_too_long_goes_before_full_batches():
    queue = Queue(batch=1, patience=2)
    put(queue, "b", arrived=0), put(queue, "a", arrived=1), put(queue, "a", arrived=1)
    assert taken(queue, "a", 2) == ("a", [1])
    assert taken(queue, "a", 2.5) == ("b", [0])


def test_a_request_larger_than_a_batch_is_taken_whole_and_alone():
    queue = Queue(batch=2, patience=9)
    put(queue, "a", items=5), put(queue, "a", arrived=1)
    assert len(queue) == 6
    assert taken(queue, None, 1) == ("a", [0]) and taken(queue, "a", 1) == ("a", [1])


def test_what_was_given_up_is_not_taken():
    queue = Queue(batch=8, patience=9)
    put(queue, "a").given_up = True
    put(queue, "b", arrived=1)
    assert taken(queue, "a", 1) == ("b", [1]) and len(queue) == 0


def test_an_early_request_that_comes_back_stands_before_later_ones():
    queue = Queue(batch=8, patience=9)
    for arrived in (2, 3, 1):
        put(queue, "a", arrived=arrived)
    assert taken(queue, "a", 4) == ("a", [1, 2, 3])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4)), max_size=30), st.integers(1, 5))
def test_everything_is_taken_once_and_no_batch_mixes_tasks(requests, batch):
    queue, current, seen = Queue(batch, patience=3), None, []
    made = [put(queue, task, items, arrived) for arrived, (task, items) in enumerate(requests)]
    while len(queue):
        current, parts = queue.take(current, len(requests))
        assert parts and all(part.ticket.items[0] == current for part in parts)
        assert len(parts) == 1 or sum(len(part.places) for part in parts) <= batch
        seen += [part.ticket for part in parts]
    assert sorted(map(id, seen)) == sorted(map(id, made))
