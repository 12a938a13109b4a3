"""A checkpoint's tokenizer, from tokenizer.json or from the files that Qwen2's slow tokenizer reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dparallel_ext.models import files

QWEN2 = {"Qwen2Tokenizer", "Qwen2TokenizerFast", "DreamTokenizer"}
"""Values of tokenizer_class that `qwen2` builds: Dream's remote code is Qwen2's tokenizer by another name."""
QWEN2_FAMILIES = {
    *("Dream", "sdar", "sdar_moe", "rnd1", "Fast_dLLM_Qwen", "wedlm", "sdlm", "idlm", "dream_reasoner"),
    *("a2d-qwen2", "a2d-qwen3", "qwen2", "qwen3", "qwen3_moe"),
}
"""Values of model_type for which `qwen2` builds the tokenizer if no tokenizer_class is given."""
ANY_TEXT = "a \n\U0010ffff"
"""A text with a character that no vocabulary has."""
QWEN2_WORDS = "|".join(
    (
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # the end of a contraction
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # letters, with the sign before them
        r"\p{N}",  # each digit alone
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # signs, with the ends of their lines
        r"\s*[\r\n]+",
        r"\s+(?!\S)",  # all spaces but the one that belongs to the next word
        r"\s+",
    )
)
"""The pattern by which Qwen2 cuts text into words, within which pairs are merged."""


def load(directory: Path) -> Any:
    """The `tokenizers.Tokenizer` of a checkpoint, which neither cuts texts nor pads them.

    Raises FileNotFoundError if files are missing, ValueError if they hold no tokenizer, or one that does not
    take every text.
    """
    from tokenizers import Tokenizer

    file = directory / "tokenizer.json"
    if not files.is_there(file):
        return qwen2(directory)
    text = files.read_text(file)
    try:
        tokenizer = Tokenizer.from_str(text)
        # The file keeps the settings of its last user, often the lengths of training texts.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.decode(tokenizer.encode(ANY_TEXT).ids)
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"model: {file} is not a tokenizer: {error}") from error
    _add_missing(tokenizer, directory)
    return tokenizer


def _add_missing(tokenizer: Any, directory: Path) -> None:
    """Add the tokens that tokenizer_config.json lists and tokenizer.json lacks, as transformers does.

    Raises ValueError for a token that would get another id than the listed one.
    """
    added = files.added_tokens(directory)
    missing = {text: token for text, token in added.items() if tokenizer.token_to_id(text) is None}
    tokenizer.add_tokens(_added(missing, set()))
    for text, token in missing.items():
        if (index := tokenizer.token_to_id(text)) != token["id"]:
            raise ValueError(
                f"model: tokenizer_config.json of {directory} lists {text!r:.80} with the id {token['id']}; "
                f"tokenizer.json lacks it, and would give it {index}"
            )


def _added(tokens: dict[str, dict[str, Any]], special: set[str]) -> list[Any]:
    """`AddedToken`s in the order of their ids. special: texts that are special tokens, whatever the flags."""
    from tokenizers import AddedToken

    flags = ("lstrip", "rstrip", "single_word", "normalized")
    return [
        AddedToken(
            text,
            special=bool(token.get("special")) or text in special,
            **{flag: bool(token[flag]) for flag in flags if flag in token},
        )
        for text, token in sorted(tokens.items(), key=lambda item: item[1]["id"])
    ]


def qwen2(directory: Path) -> Any:
    """Qwen2's tokenizer, from vocab.json, merges.txt and the added tokens: all that Dream's checkpoints have.

    Text is normalised to NFC, cut into words, and the bytes of each word are merged in pairs. Added tokens
    are found before that, each by its own flags (`lstrip`, `rstrip`, `single_word`, `normalized`), and have
    exactly the ids that the files give them, even if ids between them are unused.

    This is Qwen2Tokenizer of transformers 5. The slow class of transformers 4 normalises first, so it does
    not find "<|im_end|>" before a U+0338, which combines with the ">".
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary, merges = _vocabulary(directory), _merges(directory)
    added = files.added_tokens(directory)
    ids = {**vocabulary, **{text: token["id"] for text, token in added.items()}}
    clash = next((text for text in added if vocabulary.get(text, ids[text]) != ids[text]), None)
    if clash is not None:
        raise ValueError(
            f"model: the tokens of {directory} do not have one id each: {clash!r} is {vocabulary[clash]} in "
            f"vocab.json and {ids[clash]} when added"
        )
    of_id = {index: text for text, index in ids.items()}
    if len(of_id) != len(ids):
        twice = next(text for text, index in ids.items() if of_id[index] != text)
        raise ValueError(
            f"model: the tokens of {directory} do not have one id each: {twice!r:.80} and "
            f"{of_id[ids[twice]]!r:.80} are both {ids[twice]} in vocab.json and the added tokens"
        )
    try:
        # The added tokens are part of this vocabulary for the sake of their ids; no merge leads to them.
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"model: vocab.json and merges.txt of {directory} do not fit: {error}") from error
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _add(tokenizer, directory, added)
    return tokenizer


def _add(tokenizer: Any, directory: Path, added: dict[str, dict[str, Any]]) -> None:
    """Add the added tokens to the tokenizer, and bos and eos if its config asks for them."""
    from tokenizers import AddedToken, processors

    config, roles = files.read_json(directory / "tokenizer_config.json"), files.special_tokens(directory)
    special = {*roles.values(), *files.more_special_tokens(directory)}
    tokens = _added(added, special)
    in_vocabulary = [
        text for text in roles.values() if text not in added and tokenizer.token_to_id(text) is not None
    ]
    tokenizer.add_tokens(
        [*tokens, *(AddedToken(text, special=True) for text in dict.fromkeys(in_vocabulary))]
    )
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))
    ends = {
        role: roles.get(role) if config.get(f"add_{role}") else None for role in ("bos_token", "eos_token")
    }
    if any(ends.values()):
        single = " ".join(filter(None, (ends["bos_token"], "$A", ends["eos_token"])))
        known = [(text, tokenizer.token_to_id(text)) for text in dict.fromkeys(filter(None, ends.values()))]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=known)


def _vocabulary(directory: Path) -> dict[str, int]:
    config = files.read_json(directory / "tokenizer_config.json")
    kind = config.get("tokenizer_class")
    missing = [name for name in ("vocab.json", "merges.txt") if not files.is_there(directory / name)]
    if missing:
        other = directory / "tokenizer.model"
        hint = f"; {other.name} is not read, save_pretrained of transformers writes tokenizer.json"
        raise FileNotFoundError(
            f"model: {directory} has no tokenizer.json, nor {' and '.join(missing)} to build one from"
            + (hint if other.is_file() else "")
        )
    family = str(files.read_json(directory / "config.json").get("model_type"))
    if not (family in QWEN2_FAMILIES if kind is None else str(kind) in QWEN2):
        raise ValueError(
            f"model: {directory} has no tokenizer.json, and only {sorted(QWEN2)} are built from vocab.json "
            f"and merges.txt, not tokenizer_class {kind!r:.80} of tokenizer_config.json; "
            "transformers' save_pretrained writes the former"
        )
    vocabulary = files.read_json(directory / "vocab.json")
    wrong = next((text for text, index in vocabulary.items() if not files.is_id(index)), None)
    if wrong is not None:
        raise ValueError(
            f"model: vocab.json of {directory} gives {wrong!r:.80} the id {vocabulary[wrong]!r:.80}"
        )
    return vocabulary


def _merges(directory: Path) -> list[tuple[str, str]]:
    file = directory / "merges.txt"
    merges = []
    for number, line in enumerate(files.read_text(file).split("\n"), 1):
        if not line.strip() or (number == 1 and line.startswith("#version:")):
            continue
        parts = line.split()
        if len(parts) != 2:
            raise ValueError(f"model: {file}:{number} is {line!r:.200}, expected two parts to merge")
        merges.append((parts[0], parts[1]))
    return merges
