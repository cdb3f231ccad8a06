"""What a user calls a model in, the one model that is meant out.

The order, in this one place. A name is:

1. the path of a GGUF;
2. `miniature`, or `miniature:TYPE`, the bundled one;
3. a name or alias as `qwq models` lists it, in any case;
4. `REPO:TYPE`, the repository with or without its owner; `qwq-32b` alone means its default;
5. a type alone, such as `Q4_K_M`;
6. the beginning of exactly one name or type, with or without the owner before it.

The first rule that finds something decides. Where it finds several files, that is an error which lists them.
Knows no disk: the models come in as a list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qwq_local.errors import UsageError
from qwq_local.models.catalog import Catalog
from qwq_local.models.inventory import LocalModel, Origin

_OURS = (Origin.PULLED, Origin.CONVERTED, Origin.ADDED, Origin.HUB_CACHE)


def resolve_name(
    name: str, models: Sequence[LocalModel], catalog: Catalog, default: str
) -> LocalModel | None:
    """The model of that name, None when there is none. Raises UsageError listing the candidates of several.

    Rules 1 and 2 are the caller's: they need the disk.
    """
    wanted = name.lower()
    if wanted == catalog.name:
        return default_model(models, catalog, default)
    rules: tuple[Callable[[LocalModel], bool], ...] = (
        lambda model: model.name.lower() == wanted,
        lambda model: wanted in _full_names(model, catalog),
        lambda model: model.file_type.lower() == wanted,
        lambda model: model.name.lower().startswith(wanted) or model.file_type.lower().startswith(wanted),
        lambda model: any(each.startswith(wanted) for each in _full_names(model, catalog)),
    )
    for rule in rules:
        if found := [model for model in models if rule(model)]:
            return _only(name, found)
    return None


def default_model(models: Sequence[LocalModel], catalog: Catalog, default: str) -> LocalModel | None:
    """The chosen default, else the last that was pulled, else the catalog's in its order, else any."""
    for model in models:
        if default and model.name == default:
            return model
    # One that came and cannot be run has no time of its coming.
    fetched = [m for m in models if m.record.origin in ("pull", "convert") and m.record.added_at > 0]
    if fetched:
        return max(fetched, key=lambda model: model.record.added_at)
    order = list(catalog.files)
    own = [model for model in models if model.repo == catalog.repo and model.file_type in order]
    if own:
        return min(own, key=lambda model: order.index(model.file_type))
    return models[0] if models else None


def _only(name: str, found: list[LocalModel]) -> LocalModel:
    if len(found) > 1:
        # Another program's copy gives way to one that is ours.
        found = [model for model in found if model.origin in _OURS] or found
    if len(found) > 1:
        candidates = ", ".join(sorted({model.name for model in found}))
        paths = ", ".join(str(model.path) for model in found)
        listed = candidates if len({model.name for model in found}) == len(found) else paths
        raise UsageError(f"{name!r} is ambiguous: {listed}. Name one of them.")
    return found[0]


def _full_names(model: LocalModel, catalog: Catalog) -> list[str]:
    """`owner/name:type` and `name:type`, lower case, and the same with the catalog's short name."""
    if not model.repo or not model.file_type:
        return [model.name.lower().partition("/")[2]] if "/" in model.name else []
    repos = [model.repo, model.repo.rpartition("/")[2]]
    if model.repo == catalog.repo:
        repos.append(catalog.name)
    return [f"{repo}:{model.file_type}".lower() for repo in repos]
