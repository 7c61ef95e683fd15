"""The vocabulary of the house: one letter for every tensor axis, one name for every logical axis.

Letters, used in every docstring and einsum:

  B batch . T query length (text + image) . S key length . D model width . H heads . K head_dim .
  F mlp width . V vocabulary (text, or codebook entries) . L stacked layers . N candidates per
  prompt . E joint CLIP width . C channels . h w spatial (lower case: H is taken) . g code-grid side

Logical names are constants, so that a typo is an AttributeError here and not an array that is
silently replicated on the pod. Weights and activations have different names, as in t5x and maxtext:
a rule may shard `embed` without touching `act_embed`.

Rules map a logical name to the mesh axes that may carry it, in order of preference. They are config
data (`config.mesh.rules`); the named defaults are below.
"""

# Mesh axes. One device is the mesh (1, 1, 1): the same code path.
DATA = "data"
FSDP = "fsdp"
TENSOR = "tensor"
MESH_AXES = (DATA, FSDP, TENSOR)

# Weights.
EMBED = "embed"
HEADS = "heads"  # heads * head_dim, flattened: a minor axis of 64 is padded to 128 lanes on TPU
MLP = "mlp"
VOCAB = "vocab"
LAYERS = "layers"
POSITIONS = "positions"
CONV_IN = "conv_in"
CONV_OUT = "conv_out"
JOINT = "joint"
CODES = "codes"

# Activations.
ACT_BATCH = "act_batch"
ACT_LEN = "act_len"
ACT_EMBED = "act_embed"
ACT_HEADS = "act_heads"
ACT_MLP = "act_mlp"
ACT_VOCAB = "act_vocab"
ACT_H = "act_h"
ACT_W = "act_w"
ACT_CHAN = "act_chan"

LOGICAL = (
    EMBED, HEADS, MLP, VOCAB, LAYERS, POSITIONS, CONV_IN, CONV_OUT, JOINT, CODES,
    ACT_BATCH, ACT_LEN, ACT_EMBED, ACT_HEADS, ACT_MLP, ACT_VOCAB, ACT_H, ACT_W, ACT_CHAN,
)  # fmt: skip

_REPLICATED = {name: () for name in LOGICAL}

# Named defaults: logical name -> mesh axes (empty = replicated). Batches are split over data and
# fsdp in all of them: fsdp is data parallelism with scattered weights.
RULES = {
    "dp": {**_REPLICATED, ACT_BATCH: (DATA, FSDP)},
    "fsdp": {
        **_REPLICATED,
        ACT_BATCH: (DATA, FSDP),
        EMBED: (FSDP,),
        CONV_OUT: (FSDP,),
        CODES: (FSDP,),
    },
    "fsdp_tp": {
        **_REPLICATED,
        ACT_BATCH: (DATA, FSDP),
        ACT_HEADS: (TENSOR,),
        ACT_MLP: (TENSOR,),
        ACT_VOCAB: (TENSOR,),
        EMBED: (FSDP,),
        HEADS: (TENSOR,),
        MLP: (TENSOR,),
        VOCAB: (TENSOR,),
        CONV_OUT: (FSDP,),
        CODES: (FSDP,),
    },
}
