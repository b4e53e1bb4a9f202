"""Every error the package raises, one tree. A message names the value, the limit and the remedy.

PenstockError
├─ InputError              the caller's request is wrong (also a ValueError)
│  ├─ PromptError            empty, too long, or a token id outside the vocabulary
│  │  └─ LengthError           longer than the model, or what there is of memory, takes
│  ├─ SamplingError          a sampling parameter outside its range
│  ├─ OptionError            an unknown or contradictory argument, flag or field
│  ├─ PluginError            a plugin is missing, cannot be imported, or registers a name that is taken
│  └─ QueueFullError         admission refused: a queue or token limit is reached
├─ UnsupportedError        a name of the public surface that is not built yet (also a NotImplementedError)
├─ ModelError              the model cannot be read as one of our families
│  ├─ UnsupportedArchitectureError
│  ├─ ConfigError            a config key is unknown, missing, or has a value we do not implement
│  └─ TokenizerError
├─ CheckpointError         tensors missing, left over, truncated, or of another shape
├─ GraphError              an ill-typed node, or an op outside its stage's dialect (also a TypeError)
├─ BuildError              a stage of the compiler failed
│  ├─ PassError              a pass that must fire did not
│  └─ SelectionError         no tactic supports a node
│     └─ PinError              a pinned tactic does not exist or cannot run here (also an OptionError)
├─ EngineError             an engine directory cannot be used
│  ├─ EngineSchemaError      written by another schema version
│  ├─ EngineCorruptError     a file is missing, truncated or changed
│  ├─ EngineMismatch         compiled for another GPU or other software
│  └─ RefitError             the weights are not of this engine's spec
├─ ResourceError           memory or disk does not suffice; says which limit to lower
└─ ExecutorError           a step failed; names the requests it took along
"""

from __future__ import annotations


class PenstockError(Exception):
    """The root: `except PenstockError` catches everything this package raises on purpose."""


class InputError(PenstockError, ValueError):
    """The caller's request is wrong; nothing was started."""


class PromptError(InputError):
    """A prompt is empty, too long, or holds a token id outside the vocabulary."""


class LengthError(PromptError):
    """A prompt is longer than a request may be, or than the pool holds."""


class SamplingError(InputError):
    """A sampling parameter is outside its range."""


class OptionError(InputError):
    """An argument, flag or field is unknown, or contradicts another."""


class PluginError(InputError):
    """A plugin is missing, cannot be imported, or registers a name that is taken."""


class QueueFullError(InputError):
    """Admission refused: a queue or token limit is reached; try again later."""


class UnsupportedError(PenstockError, NotImplementedError):
    """A name of the public surface that is not built yet; raised before any work."""


class ModelError(PenstockError):
    """The model cannot be read as one of the known families."""


class UnsupportedArchitectureError(ModelError):
    """No registered family implements this architecture."""


class ConfigError(ModelError):
    """A configuration key is unknown, missing, or has a value that is not implemented."""


class TokenizerError(ModelError):
    """The tokenizer or its chat template cannot be used."""


class CheckpointError(PenstockError):
    """Tensors are missing, left over, truncated, or of another shape than the spec says."""


class GraphError(PenstockError, TypeError):
    """A node is ill-typed, or its op is not legal at this stage."""


class BuildError(PenstockError):
    """A stage of the compiler failed."""


class PassError(BuildError):
    """A pass that must fire on this graph did not."""


class SelectionError(BuildError):
    """No tactic supports a node, or a pinned one cannot run."""


class PinError(SelectionError, OptionError):
    """A pinned tactic does not exist, or cannot run on this device: the request is wrong."""


class EngineError(PenstockError):
    """An engine directory cannot be used."""


class EngineSchemaError(EngineError):
    """The engine was written by another schema version."""


class EngineCorruptError(EngineError):
    """A file of the engine is missing, truncated or changed."""


class EngineMismatch(EngineError):
    """The engine was compiled for another GPU or other software."""


class RefitError(EngineError):
    """The new weights are not of this engine's spec."""


class ResourceError(PenstockError):
    """Memory or disk does not suffice; the message says which limit to lower."""


class ExecutorError(PenstockError):
    """A step failed; the requests in it end with this error."""
