"""Loads this folder where hf-cuttlefish is not installed: `AutoModelForX.from_pretrained(folder, trust_remote_code=True)`.

hf-cuttlefish (https://pypi.org/project/hf-cuttlefish) writes this file beside the weights of each model that it has made low
rank. It is the same text for all of them and holds no code of the model: it builds the class of transformers that config.json
asks for, and puts two small layers in the place of each layer that `quantization_config` in config.json names. Where
the package is imported, the package loads the folder and this file is not run.
"""

import copy
import json
import os
import re
import sys

import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _get_model_class
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .standalone_layers import PAIRS, LowRankLinear, exchange, is_dense, largest_rank, resized_head, without_ties

FORMAT = 4
"""Version of this text, raised with each change of it."""

NAME = "modeling_low_rank"
METHOD = "cuttlefish"
NOTE_VERSION = 2

REFUSAL = (
    "\n\nThis model was made low rank by hf_cuttlefish, and transformers alone cannot load it. Either\n"
    "  pip install hf-cuttlefish, and `import hf_cuttlefish` before from_pretrained; or\n"
    "  AutoModelForX.from_pretrained(folder, trust_remote_code=True), which runs modeling_low_rank.py of the folder; or\n"
    "  `hf-cuttlefish merge FOLDER OUT`, which makes an ordinary dense model of it.\n"
    "(Deleting quantization_config from config.json does not help: the weights stay low rank.)"
)
"""Stands in config.json as `transformers_weights`. Where nothing of ours runs, transformers stops there, and shows it."""


# --- config.json ---


def is_note(note):
    """Whether a `quantization_config` is ours."""
    return isinstance(note, dict) and note.get("quant_method") == METHOD


def holders(settings):
    """The settings, and those of each model inside it, that hold a note of ours."""
    found = [settings] if is_note(settings.get("quantization_config")) else []
    for value in settings.values():
        if isinstance(value, dict):
            found += holders(value)
    return found


def auto_classes(config_class):
    """The Auto classes of transformers that have a model for this config."""
    known = {name: getattr(found, "_model_mapping", None) or () for name, found in vars(modeling_auto).items()}
    return [name for name in sorted(known) if name.startswith("AutoModel") and config_class in known[name]]


def stamp(settings, config_class):
    """Complete the settings of a factorized model, in place: what refuses, and what loads with trust_remote_code."""
    for holder in holders(settings):
        holder["transformers_weights"] = REFUSAL
    others = {k: v for k, v in (settings.get("auto_map") or {}).items() if not names_this_file(v)}
    ours = {name: f"{NAME}.LowRank{name}" for name in ["AutoConfig", *auto_classes(config_class)]}
    settings["auto_map"] = {**ours, **others}


def names_this_file(reference):
    """Whether an entry of `auto_map` means a class of this file."""
    return isinstance(reference, str) and re.fullmatch(rf"(.*--)?{NAME}\.LowRankAuto\w+", reference) is not None


def complete(folder, config_class, text):
    """Finish a folder whose config.json has just been written: stamp it, and put this file beside it."""
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):  # of adapters
        return False
    with open(path, encoding="utf-8") as file:
        settings = json.load(file)
    if not holders(settings):
        return False
    stamp(settings, config_class)
    new = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    for target, content in ((os.path.join(folder, f"{NAME}.py"), text), (path, new)):
        partial = f"{target}.partial"
        with open(partial, "w", encoding="utf-8") as file:
            file.write(content)
        os.replace(partial, target)
    return True


# --- the model ---


class _LowRank:
    """What a class of transformers gets in front of it: its own structure, with the noted layers low rank."""

    def __init__(self, config, *args, **kwargs):
        note = vars(config).pop("cuttlefish", None)
        super().__init__(config, *args, **kwargs)
        ranks = (note or {}).get("ranks", {})
        modules, prefix, found, stacks = dict(self.named_modules()), f"{self.base_model_prefix}.", {}, []
        for name, rank in ranks.items():
            for own in (name, name.removeprefix(prefix), prefix + name):
                if is_dense(modules.get(own)):
                    found[own] = _checked(rank, modules[own], own)
                    break
                if exchange_stack(modules, own, rank):
                    stacks.append(own)
                    break
        if not found and not stacks:
            raise ValueError(
                f"config.json names {len(ranks)} low-rank layers, such as {next(iter(ranks), None)!r}, and "
                f"{type(self).__name__} has none of them"
            )
        exchange(self, found)
        note_ranks(self)
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                _extend_plan(module)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As of transformers; the folder then loads as the one that this model came from."""
        note_ranks(self)
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True) and os.path.isdir(save_directory):
            _complete(save_directory, self)

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        _complete(working_dir, self)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _get_resized_lm_head(self, old, tokens=None, *args, **kwargs):
        return resized_head(super()._get_resized_lm_head, old, tokens, *args, **kwargs)

    def __reduce_ex__(self, protocol):
        return _blank, (type(self).__mro__[2],), vars(self)


def _settled(model):
    for layer in (module for module in model.modules() if isinstance(module, PAIRS)):
        vars(layer.down).pop("bias", None)
    return model


def _told_apart(model):
    """Give each parent of low-rank layers one more child, without weights, whose name says which they are.

    vLLM looks for siblings to fuse (q, k and v) once for all parents of one class whose children have the same names, and would
    fuse the low-rank ones of a block as the dense ones of the first block.
    """
    for parent in list(model.modules()):
        names = [name for name, child in parent.named_children() if isinstance(child, PAIRS)]
        if names and not isinstance(parent, (nn.Sequential, nn.ModuleList)):
            parent.add_module("_".join(["low_rank", *names]), nn.Identity())
    return model


def _complete(folder, model):
    with open(__file__, encoding="utf-8") as file:
        complete(folder, type(model.config), file.read())


def _blank(stock):
    made = _low_rank_class(stock)
    return made.__new__(made)


_CLASSES: dict = {}


def _low_rank_class(stock):
    if stock not in _CLASSES:
        body = {"__module__": stock.__module__, "__doc__": stock.__doc__, "__qualname__": stock.__qualname__}
        _CLASSES[stock] = type(stock.__name__, (_LowRank, stock), body)
    return _CLASSES[stock]


def exchange_stack(modules, name, rank):
    """Whether a stack of experts was made low rank: folders with some have a longer text of this file, which can."""
    return False


def _checked(rank, module, name):
    most = largest_rank(module)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
        raise ValueError(f"config.json: rank of {name!r} is {rank!r}: it must be a whole number from 1 to {most}")
    return rank


def note_ranks(model):
    """Note the ranks in the config of the model, and of each model inside it."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel) and part is not model]
    for part in [*parts, model]:  # of models that share a config the outermost has its say
        ranks = {n: m.rank for n, m in part.named_modules() if isinstance(m, PAIRS)}
        if ranks:
            linear = all(isinstance(part.get_submodule(n), LowRankLinear) for n in ranks)
            version = 1 if linear else NOTE_VERSION
            part.config.quantization_config = {"quant_method": METHOD, "version": version, "ranks": ranks}


def _extend_plan(model):
    """Tensor parallelism: what divides a weight's outputs divides those of `up`, what divides its inputs those of `down`.

    Rules for the factors come first, since vLLM takes the first that a name begins with.
    """
    layers = {re.sub(r"\d+", "*", n) for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    for holder, key in ((model, "_tp_plan"), (model.config, "base_model_tp_plan")):
        plan = getattr(holder, key, None)
        if not plan or (holder is model.config and model.base_model is not model):
            continue
        rules = {}
        for name in sorted(layers & set(plan)):
            if plan[name].startswith("colwise"):
                rules |= {f"{name}.down": "replicate", f"{name}.up": plan[name]}
            elif plan[name].startswith("rowwise"):
                rules |= {f"{name}.down": plan[name], f"{name}.up": "replicate"}
        dense = {re.sub(r"\d+", "*", n) for n, m in model.named_modules() if is_dense(m)}
        rest = {name: style for name, style in plan.items() if name not in layers or name in dense}
        rest = without_ties(model, rest)
        setattr(holder, key, {**rules, **rest})


# --- what config.json's auto_map names ---


class LowRankAutoConfig:
    """The stock config, with the note of ranks set aside, so that nothing takes the model for a quantized one."""

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Nothing to do: `complete` writes the entries."""

    @classmethod
    def from_pretrained(cls, folder, **kwargs):
        """As of `AutoConfig`."""
        if "hf_cuttlefish" in sys.modules:  # it takes precedence
            return transformers.AutoConfig.from_pretrained(folder, **kwargs)
        settings, kwargs = PreTrainedConfig.get_config_dict(folder, **kwargs)
        return CONFIG_MAPPING[settings["model_type"]].from_dict(_set_aside(settings), **kwargs)


def _set_aside(settings):
    settings = {key: _set_aside(value) if isinstance(value, dict) else value for key, value in settings.items()}
    if is_note(settings.get("quantization_config")):
        settings["cuttlefish"] = settings.pop("quantization_config")
        settings.pop("transformers_weights", None)
    return settings


def _prepared(config):
    """A copy of a config with the note set aside, whether it came from `LowRankAutoConfig` or from elsewhere; and the note."""
    config = copy.deepcopy(config)
    own = vars(config)
    if is_note(own.get("quantization_config")):
        own["cuttlefish"] = own.pop("quantization_config")
        own.pop("transformers_weights", None)
    for value in own.values():
        if isinstance(value, PreTrainedConfig):
            for key in ("quantization_config", "cuttlefish", "transformers_weights"):
                if key != "quantization_config" or is_note(vars(value).get(key)):
                    vars(value).pop(key, None)
    note = own.get("cuttlefish")
    if not isinstance(note, dict) or not isinstance(note.get("ranks"), dict) or not note["ranks"]:
        raise ValueError(f"config.json names no low-rank layers: its note is {note!r:.80}")
    version = note.get("version", 1)
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= NOTE_VERSION:
        raise ValueError(
            f"config.json: the note of low-rank layers has version {version!r}, and this modeling_low_rank.py reads up to "
            f"{NOTE_VERSION}: `pip install -U hf-cuttlefish`, and import it"
        )
    return config


class _Remote:
    """Stands for one Auto class."""

    _supports_attention_backend = True
    auto = "AutoModel"

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Nothing to do."""

    @classmethod
    def is_backend_compatible(cls):
        """Asked by vLLM's Transformers backend."""
        return True

    @classmethod
    def _find(cls, config):
        stock = _get_model_class(config, getattr(transformers, cls.auto)._model_mapping)
        text = config.sub_configs.get("text_config")
        if text is not None and getattr(stock, "config_class", None) is text and type(config) is not text:
            note, config = config.cuttlefish, config.get_text_config()
            config.cuttlefish = note
        return stock, config

    @classmethod
    def from_pretrained(cls, folder, *args, config, **kwargs):
        """As of the Auto class.

        Raises ValueError: config.json and the weights do not belong together; quantization_config is given.
        """
        if "hf_cuttlefish" in sys.modules:
            return getattr(transformers, cls.auto).from_pretrained(
                folder, *args, **{**kwargs, "trust_remote_code": False}
            )
        if kwargs.get("quantization_config") is not None:
            raise ValueError(
                "quantization_config= does not go with a low-rank folder: load it, and quantize the model then, or merge it "
                "(`hf-cuttlefish merge FOLDER OUT`) and load that"
            )
        stock, config = cls._find(_prepared(config))
        with_info = kwargs.pop("output_loading_info", False)
        model, info = _low_rank_class(stock).from_pretrained(
            folder, *args, config=config, output_loading_info=True, **kwargs
        )
        _settled(model)
        factors = {f"{n}.{p}.weight" for n, m in model.named_modules() if isinstance(m, PAIRS) for p in ("down", "up")}
        lost = sorted(factors & set(info["missing_keys"]))
        if lost:
            raise ValueError(f"the weights hold no {lost[0]}: config.json and the tensors belong to different models")
        for key in info["unexpected_keys"]:
            name = re.sub(r"\.(down|up)\.weight$", "", key)
            if name != key and {name, f"{name}.weight"} & set(info["missing_keys"]):
                raise ValueError(
                    f"config.json does not say that {name} is low rank: it and the tensors belong to different models"
                )
        return (model, info) if with_info else model

    @classmethod
    def _from_config(cls, config, **kwargs):
        """As of the Auto class: the structure, without the weights."""
        stock, config = cls._find(_prepared(config))
        return _told_apart(_settled(_low_rank_class(stock)._from_config(config, **kwargs)))


def __getattr__(name):
    """LowRankAutoModelForX for each Auto class of transformers."""
    auto = name.removeprefix("LowRank")
    if auto == name or not auto.startswith("AutoModel") or not hasattr(transformers, auto):
        raise AttributeError(f"modeling_low_rank.py has no {name!r}")
    made = type(name, (_Remote,), {"auto": auto, "__module__": __name__})
    globals()[name] = made
    return made
