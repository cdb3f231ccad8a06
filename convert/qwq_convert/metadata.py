"""The GGUF's key-values from a checkpoint's documents, in the order of llama.cpp's converter.

llama-quantize moves the quantization version and the file type to the end. The model's name and description
come from gguf's own heuristics.
"""

from __future__ import annotations

from pathlib import Path

import gguf
from gguf import GGUFType, GGUFWriter, Keys, RopeScalingType
from gguf import GGUFValueType as ValueType

from qwq_convert.architecture import KEY_LENGTH, VALUE_LENGTH
from qwq_convert.checkpoint import Checkpoint, optional_document, required_document
from qwq_convert.key_values import KeyValues
from qwq_convert.model_config import ModelConfig
from qwq_convert.strict_json import Fields, checked_text, shown
from qwq_convert.tokenizer import add_chat_templates, add_special_tokens, read_vocabulary
from qwq_local.errors import ConvertError

MODEL_CARD = "README.md"
MAX_FRONT_MATTER = 2**18
I32_MIN, I32_MAX = -(2**31), 2**31 - 1

# GGUF key, its type, and the names it goes by in generation_config.json.
SAMPLING = (
    (Keys.General.SAMPLING_SEQUENCE, ValueType.STRING, ("sequence",)),
    (Keys.General.SAMPLING_TOP_K, ValueType.INT32, ("top_k",)),
    (Keys.General.SAMPLING_TOP_P, ValueType.FLOAT32, ("top_p",)),
    (Keys.General.SAMPLING_MIN_P, ValueType.FLOAT32, ("min_p",)),
    (Keys.General.SAMPLING_XTC_PROBABILITY, ValueType.FLOAT32, ("xtc_probability",)),
    (Keys.General.SAMPLING_XTC_THRESHOLD, ValueType.FLOAT32, ("xtc_threshold",)),
    (Keys.General.SAMPLING_TEMP, ValueType.FLOAT32, ("temperature",)),
    (Keys.General.SAMPLING_PENALTY_LAST_N, ValueType.INT32, ("penalty_last_n",)),
    (Keys.General.SAMPLING_PENALTY_REPEAT, ValueType.FLOAT32, ("penalty_repeat", "repetition_penalty")),
    (Keys.General.SAMPLING_MIROSTAT, ValueType.INT32, ("mirostat",)),
    (Keys.General.SAMPLING_MIROSTAT_TAU, ValueType.FLOAT32, ("mirostat_tau",)),
    (Keys.General.SAMPLING_MIROSTAT_ETA, ValueType.FLOAT32, ("mirostat_eta",)),
)


def build_key_values(
    checkpoint: Checkpoint, config: ModelConfig, n_parameters: int, name: str | None
) -> KeyValues:
    """Every key-value but those that depend on the file type. Raises ConvertError for a faulty document.

    `name` replaces the general.name from the model card, config.json or the checkpoint's label.
    """
    config_json = required_document(checkpoint, "config.json")
    tokenizer = required_document(checkpoint, "tokenizer.json")
    tokenizer_config = required_document(checkpoint, "tokenizer_config.json")
    vocabulary = read_vocabulary(tokenizer, tokenizer_config, config.shape.n_vocab)
    writer = GGUFWriter(None, config.shape.architecture.name)
    writer.add_type(GGUFType.MODEL)
    _add_sampling(writer, optional_document(checkpoint, "generation_config.json"))
    _add_description(writer, checkpoint, config_json, n_parameters, name)
    _add_figures(writer, config)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(vocabulary.pieces)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    add_special_tokens(writer, tokenizer, tokenizer_config, config_json, vocabulary)
    add_chat_templates(writer, checkpoint, tokenizer_config)
    return writer.kv_data[0]


def _add_figures(writer: GGUFWriter, config: ModelConfig) -> None:
    key = config.shape.architecture.key
    for name, value in config.shape.figures().items():
        writer.add_uint32(key(name), value)
    if (scaling := config.rope_scaling) is not None:
        writer.add_rope_scaling_type(RopeScalingType(scaling.kind))
        writer.add_rope_scaling_factor(scaling.factor)
        if scaling.original_context is not None:
            writer.add_rope_scaling_orig_ctx_len(scaling.original_context)
        for name, number in scaling.details.items():
            writer.add_float32(name.format(arch=writer.arch), number)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.states_head_dim:
        writer.add_uint32(key(KEY_LENGTH), config.shape.head_dim)
        writer.add_uint32(key(VALUE_LENGTH), config.shape.head_dim)


def _add_sampling(writer: GGUFWriter, generation: Fields) -> None:
    for key, kind, names in SAMPLING:
        for name in names:
            value: str | float | None
            if kind == ValueType.STRING:
                value = generation.optional_text(name)
            elif kind == ValueType.INT32:
                value = generation.optional_integer(name, I32_MIN, I32_MAX)
            else:
                value = generation.optional_number(name)
            if value is not None:
                writer.add_key_value(key, value, kind)
                break


def _add_description(
    writer: GGUFWriter, checkpoint: Checkpoint, config: Fields, n_parameters: int, name: str | None
) -> None:
    card = _front_matter(checkpoint.document(MODEL_CARD))
    label = checkpoint.label
    # A cache snapshot's folder is named by a hash. Its repository id is the name that config.json often
    # lacks.
    model_id = config.optional_text("_name_or_path") or (label if label and "/" in label else None)
    try:
        description = gguf.Metadata.apply_metadata_heuristic(
            gguf.Metadata(),
            card,
            {"_name_or_path": model_id},
            Path(label) if label else None,
            n_parameters,
        )
        description.name = name or description.name or label or writer.arch
        if description.size_label is None:
            description.size_label = gguf.size_label(n_parameters, n_parameters, 0, 0)
        description.set_gguf_meta_model(writer)
    except Exception as error:  # the heuristics raise many kinds for odd front matter
        raise ConvertError(f"{MODEL_CARD}: cannot be made sense of ({error}). Mend or remove it.") from None
    for key, field in writer.kv_data[0].items():
        is_text = field.type == ValueType.STRING
        for text in [field.value] if is_text else field.value if field.type == ValueType.ARRAY else ():
            if not isinstance(text, str):
                raise ConvertError(f"{MODEL_CARD}: {key} is {shown(text)}, expected a text. Quote it.")
            checked_text(text, f"{MODEL_CARD}: {key}")


def _front_matter(content: bytes | None) -> dict[str, object]:
    """The YAML between the first two `---` lines of a model card."""
    if content is None or not content.startswith(b"---"):
        return {}
    import yaml  # type: ignore[import-untyped]  # only a checkpoint with a model card needs it

    try:
        lines = content.decode("utf-8").splitlines()
        end = lines.index("---", 1) if "---" in lines[1:] else len(lines)
        # As the reference: tabs as spaces, and Norway's language code is not the word for false.
        text = "\n".join(lines[1:end]).replace("\t", "  ").replace("- no\n", '- "no"\n')
        if len(text) > MAX_FRONT_MATTER or any(isinstance(e, yaml.AliasEvent) for e in yaml.parse(text)):
            raise ValueError("too long, or with aliases, which can grow without bound")
        card = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConvertError(
            f"{MODEL_CARD}: front matter cannot be read ({reason}). Mend or remove it."
        ) from None
    return {str(key): value for key, value in card.items()} if isinstance(card, dict) else {}
