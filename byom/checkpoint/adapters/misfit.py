"""Sentences for trained values that do not fit the base of their adapter."""

from __future__ import annotations

from byom.weights.match import is_resized

VOCABULARY = (
    "The adapter was trained with a vocabulary of another size, with tokens added or rows padded: give the base the "
    "same rows (in transformers, model.resize_token_embeddings(rows), then save), with the tokenizer of the adapter"
)


def misfit(origin: str, name: str, shape: tuple[int, ...], base: str, wanted: tuple[int, ...], remedy: str) -> str:
    """Say why a value that was trained whole does not fit its parameter.

    Args:
        origin: What the adapter is called.
        name: The parameter, as the adapter has it.
        shape: The value's shape.
        base: What the base is called.
        wanted: The parameter's shape.
        remedy: What to do if nothing more is known.

    Returns:
        A sentence.
    """
    told = f"{origin}: '{name}' has shape {shape} and {wanted} in {base}"
    return f"{told}. {VOCABULARY if is_resized(name, shape, wanted) else remedy}"
