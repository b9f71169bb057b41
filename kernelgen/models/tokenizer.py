"""Text to tokens and back, by the vocabulary that a GGUF file carries.

All work is done by the `tokenizers` library, which is set up here from the metadata
(tokenizer.ggml.*).  The kinds are "gpt2" (byte-level BPE), "llama" (SentencePiece's BPE, whose
merges follow from the scores of the pieces) and "t5" (SentencePiece's unigram model).
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from kernelgen.errors import FileError

_SPACE = "\u2581"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _words(numbers: str) -> str:
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
        rf"|{_REST}"
    )


#: How text is cut before merging, by tokenizer.ggml.pre: the expressions are those that the models
#: were trained with, as their tokenizer.json files have them.  Empty: GPT-2's own
_CUTS = {
    "gpt-2": "",
    "default": "",
    "smollm": r"\p{N}",
    "llama-bpe": _words(r"\p{N}{1,3}"),
    "llama3": _words(r"\p{N}{1,3}"),
    "llama-v3": _words(r"\p{N}{1,3}"),
    "qwen2": _words(r"\p{N}"),
    "deepseek-r1-qwen": _words(r"\p{N}"),
    "tekken": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
        rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
    ),
}
#: where a word that is a token is not merged from its bytes, and text begins with a token of its
#: own unless the file says otherwise
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")
#: where what an expression leaves is cut by GPT-2's own
_CUT_ON = ("gpt-2", "default", "smollm")

#: tokenizer.ggml.token_type
_CONTROL, _USER_DEFINED = 3, 4

#: tokens at which a text ends
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


class Tokenizer:
    """The tokenizer of a GGUF file, from its metadata.

    size  tokens of the vocabulary
    bos   the token that texts begin with, or None
    ends  tokens after which nothing follows

    Raises FileError where the metadata have no tokenizer, or one that is not known, and where the
    package `tokenizers` is missing.
    """

    def __init__(self, metadata: Mapping[str, Any], where: str = "the file") -> None:
        read = _Reader(metadata, where)
        kind = str(read.get("model", ""))
        makers = {"gpt2": _byte_level, "llama": _sentencepiece, "t5": _unigram}
        if kind not in makers:
            raise FileError(
                f"{where} has no tokenizer (tokenizer.ggml.model is {kind[:60]!r});"
                f" {', '.join(makers)} are known"
            )
        tokens = read.strings("tokens")
        self.size = read.size = len(tokens)
        kinds = read.get("token_type", [1] * self.size)
        if not isinstance(kinds, list) or len(kinds) != self.size:
            raise FileError(f"{where} has not one tokenizer.ggml.token_type for each token")
        self._where = where
        self._template = metadata.get("tokenizer.chat_template")
        self._made = _made(makers[kind], read, tokens)
        self._add_special(tokens, kinds)
        starts = kind == "llama" or read.get("pre", "") in _WHOLE_WORDS
        self.bos = read.token("bos_token_id") if read.get("add_bos_token", starts) else None
        found = (read.token(name) for name in _ENDS)
        self.ends = frozenset(one for one in found if one is not None)
        self._names = {
            name: tokens[at]
            for name, at in (("bos_token", read.token("bos_token_id")),
                             ("eos_token", read.token("eos_token_id")))
            if at is not None
        }  # fmt: skip

    def _add_special(self, tokens: Sequence[str], kinds: Sequence[int]) -> None:
        added = _library().AddedToken
        for special in (True, False):
            wanted = _CONTROL if special else _USER_DEFINED
            some = [
                added(token, special=special, normalized=False)
                for token, one in zip(tokens, kinds, strict=True)
                if one == wanted and token
            ]
            (self._made.add_special_tokens if special else self._made.add_tokens)(some)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The tokens of a text, `bos` in front where the model wants it.

        special  names of control tokens in the text stand for these, as in chats
        """
        self._made.encode_special_tokens = not special
        try:
            found = list(self._made.encode(text, add_special_tokens=False).ids)
        except Exception as error:  # the library raises plain ones
            raise FileError(
                f"the text cannot be cut into tokens of {self._where}: {error}; its vocabulary"
                " lacks what the text has"
            ) from error
        return found if self.bos is None or found[:1] == [self.bos] else [self.bos, *found]

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of a conversation, up to where the model answers; encode it with special=True.

        messages  each with "role" ("system", "user", "assistant") and "content"

        Raises FileError where the file has no template of conversations, or it fails.
        """
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if not isinstance(self._template, str):
            raise FileError(
                f"{self._where} has no tokenizer.chat_template, so conversations cannot be written"
                " as it wants them; give it plain text"
            )

        def refuse(reason: str) -> None:
            raise TemplateError(reason)

        # what the templates of the Hugging Face hub expect
        world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        world.globals |= {
            "raise_exception": refuse,
            "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        }
        try:
            template = world.from_string(self._template)
            return template.render(messages=messages, add_generation_prompt=True, **self._names)
        except Exception as error:  # a program of the file's author may fail in any way
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise FileError(
                f"the template of conversations of {self._where} fails: {said}"
            ) from error

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens, without control tokens."""
        found: str = self._made.decode(list(tokens), skip_special_tokens=True)
        return found

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text of tokens as they come, in pieces that are whole characters."""
        step = _library().decoders.DecodeStream(skip_special_tokens=True)
        for token in tokens:
            piece = step.step(self._made, token)
            if piece:
                yield piece


class _Reader:
    """The tokenizer's part of the metadata."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self._metadata, self.where = metadata, where
        self.size = 0

    def get(self, key: str, default: Any) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    def strings(self, key: str) -> list[str]:
        found = self.get(key, None)
        if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
            raise FileError(
                f"{self.where} has no list of texts tokenizer.ggml.{key}, which its tokenizer needs"
            )
        return found

    def numbers(self, key: str, count: int) -> list[float]:
        found = self.get(key, None)
        if not isinstance(found, list) or len(found) != count:
            raise FileError(
                f"{self.where} has not {count} numbers tokenizer.ggml.{key}, one for each token"
            )
        return found

    def token(self, key: str) -> int | None:
        found = self.get(key, None)
        return found if isinstance(found, int) and 0 <= found < self.size else None


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise FileError(
            "text becomes tokens with the package tokenizers, which is not installed: pip install"
            " kernelgen[models]"
        ) from error
    return tokenizers


def _made(make: Callable[[_Reader, Sequence[str]], Any], read: _Reader, tokens: list[str]) -> Any:
    try:
        return make(read, tokens)
    except FileError:
        raise
    except Exception as error:  # the library raises plain ones about vocabularies
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise FileError(f"the tokenizer of {read.where} contradicts itself: {said}") from error


def _byte_level(read: _Reader, tokens: Sequence[str]) -> Any:
    """Byte-level BPE (Radford et al., 2019): bytes are spelt as letters, merges are listed."""
    lib = _library()
    pre = read.get("pre", "default")
    if pre not in _CUTS:
        raise FileError(
            f"the tokenizer of {read.where} cuts text as {str(pre)[:60]!r} does;"
            f" {', '.join(_CUTS)} are known"
        )
    merges = [tuple(one.split(" ", 1)) for one in read.strings("merges")]
    made = lib.Tokenizer(
        lib.models.BPE(_numbered(tokens), merges, ignore_merges=pre in _WHOLE_WORDS)
    )
    parts = lib.pre_tokenizers
    first = [parts.Split(lib.Regex(_CUTS[pre]), "isolated")] if _CUTS[pre] else []
    last = parts.ByteLevel(add_prefix_space=False, use_regex=pre in _CUT_ON)
    made.pre_tokenizer = parts.Sequence([*first, last])
    made.decoder = lib.decoders.ByteLevel()
    return made


def _sentencepiece(read: _Reader, tokens: Sequence[str]) -> Any:
    """SentencePiece's BPE: of two neighbours those are merged whose piece has the best score."""
    lib = _library()
    scores = read.numbers("scores", len(tokens))
    numbers = _numbered(tokens)
    pairs = [
        (-scores[n], token[:at], token[at:])
        for token, n in numbers.items()
        for at in range(1, len(token))
        if token[:at] in numbers and token[at:] in numbers
    ]
    merges = [(left, right) for _, left, right in sorted(pairs, key=lambda pair: pair[0])]
    unknown = read.token("unknown_token_id")
    model = lib.models.BPE(
        numbers, merges, byte_fallback=True, fuse_unk=True,
        unk_token=None if unknown is None else tokens[unknown],
    )  # fmt: skip
    return _with_spaces(lib, read, lib.Tokenizer(model))


def _unigram(read: _Reader, tokens: Sequence[str]) -> Any:
    """SentencePiece's unigram model (Kudo, 2018): the most probable pieces."""
    lib = _library()
    scores = read.numbers("scores", len(tokens))
    pieces = list(zip(tokens, map(float, scores), strict=True))
    unknown = read.token("unknown_token_id")
    fallback = "<0x00>" in tokens
    return _with_spaces(
        lib, read, lib.Tokenizer(lib.models.Unigram(pieces, unknown, byte_fallback=fallback))
    )


def _with_spaces(lib: Any, read: _Reader, made: Any) -> Any:
    """Spaces are letters, one of them in front of a text."""
    parts, back = lib.normalizers, lib.decoders
    prefix = bool(read.get("add_space_prefix", True))
    made.normalizer = parts.Sequence(
        [parts.Prepend(_SPACE)] * prefix + [parts.Replace(" ", _SPACE)]
    )
    first = [back.Strip(" ", 1, 0)] if prefix else []
    made.decoder = back.Sequence(
        [back.Replace(_SPACE, " "), back.ByteFallback(), back.Fuse(), *first]
    )
    return made


def _numbered(tokens: Sequence[str]) -> dict[str, int]:
    return {token: n for n, token in enumerate(tokens)}
