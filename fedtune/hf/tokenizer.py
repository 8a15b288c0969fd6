"""Tokenizer and model as one pair: ids within the embeddings, one padding id for both."""

from __future__ import annotations

from typing import Any

import transformers

from fedtune.errors import FedtuneError


def load_tokenizer(place: str, task: str, known: dict[str, Any]) -> Any:
    """The tokenizer, or the image processor (its PIL form, so that pixels do not depend on whether
    torchvision is there)."""
    if task == "image-classify":
        return transformers.AutoImageProcessor.from_pretrained(place, backend="pil", **known)
    return transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False, **known)


def fit_tokenizer(net: Any, tokenizer: Any, name: str) -> None:
    """Give model and tokenizer the same padding token. Raises M303 where ids do not fit.

    It is the tokenizer's (end of text if it has none), because a generative classifier reads the last token
    that is not the configuration's
    padding; or the model's, where its positions are counted from it.
    """
    rows = net.get_input_embeddings().weight.shape[0]
    ids = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
    if ids > rows:
        raise FedtuneError(
            "M303",
            f"a tokenizer with ids up to {ids - 1} but only {rows} embeddings in {name}",
            "a tokenizer made for this model",
            "use the tokenizer files of the same model",
        )
    if tokenizer.pad_token_id is None:  # any token will do: padding is masked everywhere
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    behind = position_padding(net)
    if behind is not None and behind != tokenizer.pad_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(behind)
    if tokenizer.pad_token_id is None or (behind is not None and behind != tokenizer.pad_token_id):
        raise FedtuneError(
            "M303",
            f"a tokenizer without a token for the padding id {behind} of {name}",
            "a tokenizer made for this model",
            "use the tokenizer files of the same model",
        )
    for config in {id(one): one for one in (net.config, net.config.get_text_config())}.values():
        config.pad_token_id = tokenizer.pad_token_id


def position_padding(net: Any) -> int | None:
    """The padding id behind which a network counts positions (RoBERTa's kind), None where it counts from 0:
    such a model's own id is right."""
    tables = [module for path, module in net.named_modules() if "position" in path.rpartition(".")[2]]
    return next(
        (int(table.padding_idx) for table in tables if getattr(table, "padding_idx", None) is not None), None
    )


def refuse_unknown(tokenizer: Any, name: str, rows: list[list[int]]) -> None:
    """Raises M303 where most of the data's tokens are the unknown one: files that belong to another model, or
    none at all."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if (
        unknown is None or unknown == tokenizer.eos_token_id
    ):  # GPT-2's kind has no unknown token, and names its end of text there
        return
    special = set(tokenizer.all_special_ids) - {unknown}
    ids = [token for row in rows for token in row if token not in special]
    lost = sum(token == unknown for token in ids)
    if ids and 2 * lost > len(ids):
        raise FedtuneError(
            "M303",
            f"a tokenizer of {name} that does not know {lost} of {len(ids)} tokens of the data",
            "one that knows most of them",
            "check that the tokenizer's files (tokenizer.json, or vocab.txt) lie in the model's folder and "
            "are this model's",
        )
