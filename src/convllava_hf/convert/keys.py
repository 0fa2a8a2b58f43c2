"""Parameter names of other checkpoints, and the pure function that maps them to the names here.

A table is an ordered tuple of (anchored pattern, name here). The first pattern that matches a name decides; a name
here of `None` means that the weight is known and not used by ConvLLaVA. A name that no pattern matches is an error.
"""

import re
from collections.abc import Iterable, Mapping

from ..errors import ConvLlavaError


Table = tuple[tuple[str, str | None], ...]

TOWER = "model.vision_tower."
LANGUAGE_MODEL = "model.language_model."
PROJECTOR = "model.multi_modal_projector."
HEAD = "lm_head.weight"

# Weights that bear their names here already.
SAME_TABLE: Table = ((r"^(.+)$", r"\1"),)

# transformers' ConvNeXt, alone or inside a classifier. ConvLLaVA's features are the last stage's output, so the layer
# norm that ConvNextModel keeps for pooling has no place here; neither has a classifier's head.
CONVNEXT_TABLE: Table = (
    (r"^(?:convnext\.|model\.vision_tower\.)?(embeddings|encoder)\.(.+)$", TOWER + r"\1.\2"),
    (r"^(?:convnext\.|model\.vision_tower\.)?layernorm\.(?:weight|bias)$", None),
    (r"^classifier\.(?:weight|bias)$", None),
)

# timm's ConvNeXt, alone or as the trunk of an OpenCLIP model, whose other parts are not used. `head` is the pooling
# norm with what follows it; `norm_pre` is the same norm in classifiers that apply it before pooling.
_TRUNK = r"^(?:visual\.trunk\.)?"
TIMM_TABLE: Table = (
    (r"^(?:visual\.trunk\.)?stem\.0\.(weight|bias)$", TOWER + r"embeddings.patch_embeddings.\1"),
    (r"^(?:visual\.trunk\.)?stem\.1\.(weight|bias)$", TOWER + r"embeddings.layernorm.\1"),
    (
        r"^(?:visual\.trunk\.)?stages\.(\d+)\.downsample\.([01])\.(weight|bias)$",
        TOWER + r"encoder.stages.\1.downsampling_layer.\2.\3",
    ),
    (
        r"^(?:visual\.trunk\.)?stages\.(\d+)\.blocks\.(\d+)\.conv_dw\.(weight|bias)$",
        TOWER + r"encoder.stages.\1.layers.\2.dwconv.\3",
    ),
    (
        r"^(?:visual\.trunk\.)?stages\.(\d+)\.blocks\.(\d+)\.norm\.(weight|bias)$",
        TOWER + r"encoder.stages.\1.layers.\2.layernorm.\3",
    ),
    (
        r"^(?:visual\.trunk\.)?stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc([12])\.(weight|bias)$",
        TOWER + r"encoder.stages.\1.layers.\2.pwconv\3.\4",
    ),
    (
        r"^(?:visual\.trunk\.)?stages\.(\d+)\.blocks\.(\d+)\.gamma$",
        TOWER + r"encoder.stages.\1.layers.\2.layer_scale_parameter",
    ),
    (r"^(?:visual\.trunk\.)?(?:head|norm_pre)\..+$", None),
    (r"^(?:visual\.head|text|transformer|token_embedding|ln_final)\..+$", None),
    (r"^(?:logit_scale|logit_bias|positional_embedding|text_projection)$", None),
)

# A tower within the original's shards. Derivatives (toshi456/ConvLLaVA-JP) have timm's names there.
SHARDS_TOWER = "model.vision_tower."
SHARDS_TOWER_TABLE: Table = (
    (r"^model\.vision_tower\.vision_tower\.(embeddings|encoder)\.(.+)$", TOWER + r"\1.\2"),
    (r"^model\.vision_tower\.vision_tower\.layernorm\.(?:weight|bias)$", None),
    *(
        (pattern.replace(_TRUNK, r"^model\.vision_tower\.vision_tower\.(?:(?:visual\.)?trunk\.)?"), ours)
        for pattern, ours in TIMM_TABLE
        if pattern.startswith(_TRUNK)
    ),
)

# The original's language model with the projector in it; its full state dict has a tower too. Old transformers saved
# a buffer of the rotary embedding, which is computed today.
ORIGINAL_TABLE: Table = (
    (r"^model\.mm_projector\.0\.(weight|bias)$", PROJECTOR + r"linear_1.\1"),
    (r"^model\.mm_projector\.2\.(weight|bias)$", PROJECTOR + r"linear_2.\1"),
    *SHARDS_TOWER_TABLE,
    (r"^model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$", None),
    (r"^model\.(embed_tokens|layers|norm)\.(.+)$", LANGUAGE_MODEL + r"\1.\2"),
    (r"^lm_head\.weight$", HEAD),
)


def language_model_table(base_model_prefix: str, head: str, tied: bool) -> Table:
    """The table of a causal language model of transformers.

    Args:
        base_model_prefix: the prefix of the names of the model without its head, such as `model`.
        head: the name of the head's weight, such as `lm_head.weight`.
        tied: whether the head is the embedding matrix; a copy in the file is not used then.
    """
    prefix = re.escape(base_model_prefix)
    return (
        (rf"^{re.escape(head)}$", None if tied else HEAD),
        (rf"^{prefix}\..*rotary_emb\.inv_freq$", None),
        (rf"^{prefix}\.(.+)$", LANGUAGE_MODEL + r"\1"),
    )


def rename_key(name: str, table: Table) -> str | None:
    """What the parameter `name` is called here, or `None` if it is known and not used.

    Raises:
        KeyError: no pattern matches.
    """
    for pattern, replacement in table:
        if match := re.match(pattern, name):
            return None if replacement is None else match.expand(replacement)
    raise KeyError(name)


def plan_renaming(sources: Mapping[str, tuple[Iterable[str], Table]], expected: Iterable[str]) -> dict[str, tuple]:
    """Which source gives each expected parameter, by name.

    Args:
        sources: for each source (a name for messages) its parameters' names and the table that reads them.
        expected: the names of the parameters that the new model has.

    Returns:
        `{name here: (source, name there)}`, in the order in which the sources give them.

    Raises:
        ConvLlavaError: a parameter is left over on either side, or two give the same one; all of them are listed.
    """
    expected = list(expected)
    wanted = set(expected)
    plan: dict[str, tuple] = {}
    unknown, twice = [], []
    for source, (names, table) in sources.items():
        for name in names:
            try:
                target = rename_key(name, table)
            except KeyError:
                unknown.append(f"{name} ({source})")
                continue
            if target is None:
                continue
            if target not in wanted:
                unknown.append(f"{name} ({source})")
            elif target in plan:
                twice.append(f"{target} (from {plan[target][1]} and {name})")
            else:
                plan[target] = (source, name)
    missing = [name for name in expected if name not in plan]
    problems = []
    if unknown:
        problems.append(f"{len(unknown)} weights left over that the model has no place for: {', '.join(unknown)}")
    if missing:
        problems.append(f"{len(missing)} weights missing: {', '.join(missing)}")
    if twice:
        problems.append(f"{len(twice)} weights given twice: {', '.join(twice)}")
    if problems:
        raise ConvLlavaError(
            "The weights do not fit the model that the configuration describes. "
            + "; ".join(problems)
            + ". Check that the configuration files belong to these weights."
        )
    return plan
