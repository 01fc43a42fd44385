"""What settings mean: the backbone, the token set that goes with it or names it, instructions and recipes."""

from __future__ import annotations

from typing import Any

from echo_integrations.checkpoint import Checkpoint, Place
from echo_integrations.config import DEFAULT_INSTRUCTIONS, EncoderSettings, InputError, Mode, Role, TokenSetError
from echo_integrations.recipe import Recipe, TokenRecipe, resolve_template
from echo_integrations.released import is_released
from echo_integrations.token_set import TokenSet, count_tokens, is_token_set


def resolve(settings: EncoderSettings) -> tuple[Checkpoint, TokenSet | None]:
    """The backbone, which a token set may name, and the token set, seen to belong to it.

    Raises:
        ModelLoadError: a name that is nothing, here or on the Hub.
        TokenSetError: a damaged token set, or one of another backbone.
    """
    token_set = find_token_set(settings)
    if token_set is None:
        return Checkpoint.find(settings), None
    if settings.token_set is not None and "model_name" in settings.model_fields_set:
        checkpoint = Checkpoint.find(settings)
    else:
        checkpoint = Checkpoint.find(settings, token_set.backbone, token_set.revision)
    token_set.check(checkpoint)
    return checkpoint, token_set


def find_token_set(settings: EncoderSettings) -> TokenSet | None:
    """The token set that settings mean; None in modes that have none.

    Raises:
        ModelLoadError: a name that is nothing, here or on the Hub.
        TokenSetError: none is named, or it is damaged.
    """
    if settings.mode != Mode.LLM2VEC_GEN:
        return None
    place = Place.of(settings)
    where: dict[str, Any] = {"token": place.token, "cache_folder": place.cache_folder}
    if settings.token_set is not None:
        return TokenSet.load(settings.token_set, revision=settings.token_set_revision, **where)
    try:
        return TokenSet.load(settings.model_name, revision=settings.revision, **where)
    except TokenSetError as error:
        folder = place.local(settings.model_name)
        if folder is not None and is_token_set(folder):
            raise
        raise TokenSetError(
            f"{settings.model_name!r} brings no trained tokens, which mode 'llm2vec-gen' needs: give token_set=, or as "
            "the model a released checkpoint such as 'McGill-NLP/LLM2Vec-Gen-Qwen3-8B'"
        ) from error


def check_token_set(settings: EncoderSettings) -> None:
    """Of a token set that lies here, see that it leaves room for a text and is the only one.

    One on the Hub is seen when it is used, so that constructing an encoder waits for no network.

    Raises:
        InputError: it does not, or is not.
        TokenSetError: its header cannot be read.
    """
    name = settings.model_name if settings.token_set is None else settings.token_set
    folder = Place.local(name)
    if folder is not None and (settings.token_set is not None or is_token_set(folder)):
        tokens = count_tokens(folder)
        if tokens + 1 > settings.max_length:
            raise InputError(
                f"max_length={settings.max_length} leaves no room for a text beside the {tokens} trained tokens of "
                f"{name!r}: give at least {tokens + 1}"
            )
    model = Place.local(settings.model_name)
    if settings.token_set is not None and model is not None and is_released(model):
        raise InputError(
            f"{settings.model_name!r} is a released checkpoint with tokens of its own, and token_set= was given, too: "
            "leave token_set= out, or name the backbone as the model"
        )


def instruction_of(settings: EncoderSettings, role: Role) -> str:
    """What stands before texts of a role: the setting, or in mode "llm2vec-gen" the token set's or the paper's."""
    setting = settings.query_instruction if role is Role.QUERY else settings.document_instruction
    if setting is None and (token_set := find_token_set(settings)) is not None:
        return token_set.instructions.get(role, DEFAULT_INSTRUCTIONS[role])
    return setting or ""


def recipe_of(
    settings: EncoderSettings, role: Role, checkpoint: Checkpoint, token_set: TokenSet | None
) -> Recipe | TokenRecipe:
    """How texts of a role are laid out.

    Raises:
        TemplateError, InputError: nothing is left for a text.
    """
    tokenizer = checkpoint.tokenizer
    if token_set is not None:
        tokens, compression = len(token_set.rows), token_set.compression
        return TokenRecipe(tokenizer, tokens, compression, settings.max_length, checkpoint.positions)
    setting = settings.query_template if role is Role.QUERY else settings.document_template
    template = resolve_template(setting, settings.mode, tokenizer.bos, tokenizer.eos)
    return Recipe(template, tokenizer, settings.max_length, checkpoint.positions, settings.pooling)
