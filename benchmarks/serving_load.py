"""Users of a bundle's server, for locust: each sends one text after another and waits for the answer."""

from __future__ import annotations

import os
import random

from locust import FastHttpUser, task

TASKS = os.environ["BYOM_TASKS"].split(",")
TEXTS = (
    "my card has not arrived yet and i ordered it two weeks ago",
    "play some jazz in the kitchen",
    "how do i join two tables by a column that is missing in some rows",
    "what is the best way to learn a language as an adult",
    "a lake in the north of the country that is known for its birds",
    "the plot is thin but the two leads carry the film to a moving end",
    "the company said its net profit rose to four mln dlrs in the first quarter",
    "remind me to call my mother tomorrow at nine",
)


class Asker(FastHttpUser):
    """Asks for a random task and text, without a pause."""

    @task
    def ask(self) -> None:
        """Send one text."""
        sent = {"task": random.choice(TASKS), "text": random.choice(TEXTS)}
        with self.client.post("/predict", json=sent, name="predict", catch_response=True) as response:
            if response.status_code != 200 or response.json()["answers"][0]["task"] != sent["task"]:
                response.failure(f"{response.status_code}: {response.text[:200]}")
