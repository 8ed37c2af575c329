"""Types of the trees: csrc/tree/."""

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

# -- forest --

class Path:
    """The response tokens of one branch, T each; the arrays are copies, not views of the forest."""

    @property
    def tokens(self) -> NDArray[np.int32]: ...
    @property
    def logprob(self) -> NDArray[np.float32]:
        """Of the drawn token at the sampling temperature (nats)."""
    @property
    def entropy(self) -> NDArray[np.float32]:
        """Of the distribution that the token was drawn from (nats)."""
    @property
    def confidence(self) -> NDArray[np.float32]:
        """Mass of the five most probable tokens."""
    @property
    def forced(self) -> NDArray[np.bool_]:
        """Tokens that were given, not sampled from the policy."""
    @property
    def version(self) -> NDArray[np.int32]:
        """Of the weights that sampled the token."""

class LeafTable:
    """One row per branch, in the order asked for."""

    @property
    def tree_N(self) -> NDArray[np.int64]: ...
    @property
    def trunk_N(self) -> NDArray[np.int64]:
        """Ordinal of the trunk inside its tree, pruned trunks counted."""
    @property
    def length_N(self) -> NDArray[np.int64]:
        """Response tokens."""
    @property
    def depth_N(self) -> NDArray[np.int64]:
        """Positions on the path at which a fork was made, also if its siblings were pruned."""
    @property
    def finish_N(self) -> NDArray[np.uint8]:
        """0 open, 1 stopped, 2 truncated."""
    @property
    def weight_N(self) -> NDArray[np.float64]: ...
    @property
    def log_mass_N(self) -> NDArray[np.float64]:
        """Log-prob of the response as it was drawn, in trees without replacement; else NaN."""
    @property
    def mean_entropy_N(self) -> NDArray[np.float64]:
        """Nats per token; NaN for an empty response."""

class Segments:
    """The trees above N leaves: S stretches of tokens without a fork, depth first, tree-major.

    A fork of which only one side leads to these leaves is none, so every segment but a root has
    other leaves below it than its parent. Forking at position 0 or at the end of a branch makes
    segments of length 0. Leaf segments are distinct.
    """

    @property
    def parent_S(self) -> NDArray[np.int64]:
        """Index into S, below the own one; -1 for a root."""
    @property
    def tree_S(self) -> NDArray[np.int64]: ...
    @property
    def length_S(self) -> NDArray[np.int64]:
        """Tokens that the segment adds; the prompt's length for a root."""
    @property
    def leaves_S(self) -> NDArray[np.int64]:
        """How many of these leaves end in or below it."""
    @property
    def leaf_segment_N(self) -> NDArray[np.int64]:
        """The segment in which each leaf ends."""
    @property
    def entry_offset_N1(self) -> NDArray[np.int64]:
        """N + 1 offsets into E: leaf n's response is entries [n] up to [n + 1]."""
    @property
    def entry_segment_E(self) -> NDArray[np.int64]:
        """From the first to the last of each path, without the root."""
    @property
    def entry_length_E(self) -> NDArray[np.int64]:
        """length_S of entry_segment_E."""

class Forest:
    """Branches of many prompts, each shared token stored once (16 bytes).

    A handle is an integer that is never given out twice; after `prune` it raises StaleHandleError
    in every call. Ill-formed arguments raise ValueError and change nothing. Every order is that of
    creation. One thread at a time may call methods that change the forest, none may read meanwhile.
    """

    def __init__(self) -> None: ...
    def add_tree(self, prompt: NDArray[np.int32]) -> int:
        """Start a tree for a prompt of at least one token: 0, 1, 2, ..."""
    def add_trunk(self, tree: int, seed: int) -> int:
        """Open an independent sample of the tree's prompt, of weight 1."""
    def append(
        self,
        branch_B: NDArray[np.int64],
        token_B: NDArray[np.int32],
        logprob_B: NDArray[np.float32],
        entropy_B: NDArray[np.float32],
        confidence_B: NDArray[np.float32],
        version: int = 0,
        forced: bool | NDArray[np.bool_] = False,
    ) -> None:
        """Add one token to each of these distinct open branches: all of them or, on error, none.

        `version` is that of the weights; `forced` marks tokens that were given, not sampled.
        """
    def fork(
        self, branch: int, at: int, seed_B: NDArray[np.uint64], share: bool = True
    ) -> NDArray[np.int64]:
        """Open one branch per seed that shares the first `at` response tokens of `branch`.

        `branch` may be open or finished, and keeps its handle. `share` divides its weight evenly
        among it and them, so that a trunk's leaves sum to 1; otherwise all have the weight it had.
        No token moves.
        """
    def finish(self, branch_B: NDArray[np.int64], reason_B: NDArray[np.uint8]) -> None:
        """Close open branches: 1 stopped by an end of sequence, 2 truncated at the limit."""
    def prune(self, branch: int, reason: int) -> None:
        """Forget a branch and free what only it used; reasons 1 to 6 (see pyrl.forest).

        Its weight is lost, not passed on to its siblings.
        """
    def length(self, branch: int) -> int:
        """Response tokens."""
    def seed(self, branch: int) -> int: ...
    def tree_of(self, branch: int) -> int: ...
    def trunk_of(self, branch: int) -> int:
        """Ordinal of the branch's trunk inside its tree."""
    def weight(self, branch: int) -> float: ...
    def set_weight(self, branch: int, weight: float) -> None: ...
    def stand(self, branch: int, log_mass: float, gumbel: float) -> None:
        """Say where a branch stands in a tree without replacement; see `grow`."""
    def log_mass(self, branch: int) -> float:
        """Log-prob of its tokens as they were drawn (nats); NaN outside of such trees."""
    def gumbel(self, branch: int) -> float:
        """The largest perturbed log-mass below it; NaN outside of such trees."""
    def refused(self, tree: int) -> float:
        """Kappa: the largest Gumbel number refused or dropped; -inf at first, +inf if closed."""
    def refuse(self, tree: int, gumbel: float) -> None:
        """Raise kappa to at least this; inf closes the tree to further siblings."""
    def prompt(self, tree: int) -> NDArray[np.int32]: ...
    @property
    def trees(self) -> int:
        """How many trees were added."""
    def path(self, branch: int) -> Path: ...
    def leaves(self, tree: int | None = None) -> NDArray[np.int64]:
        """Finished branches, tree-major, in creation order inside a tree."""
    def open(self) -> NDArray[np.int64]:
        """Open branches in creation order."""
    def leaf_table(self, leaf_N: NDArray[np.int64]) -> LeafTable:
        """Facts about branches, open or finished."""
    def tail_confidence(self, leaf_N: NDArray[np.int64], window: int) -> NDArray[np.float64]:
        """Mean confidence of the last `window` response tokens, or of all if fewer; NaN if none."""
    def segments(self, leaf_N: NDArray[np.int64]) -> Segments:
        """The trees restricted to these distinct branches, open or finished."""
    def top_entropy(
        self, branch: int, n: int, begin: int, end: int, min_gap: int
    ) -> NDArray[np.int64]:
        """Up to n positions in [begin, end) with the largest entropy, ascending.

        Greedy by entropy, ties to the lowest position, any two at least `min_gap` apart
        (where arXiv:2508.11356 forks). ValueError if an entropy in the range is NaN.
        """
    def pruned(self, tree: int | None = None) -> NDArray[np.int64]:
        """How many branches were pruned, indexed by reason; index 0 is unused."""
    def stats(self) -> dict[str, int]:
        """tokens (appended so far, pruned ones included), tokens_live, segments, pages, bytes."""
    def check(self) -> None:
        """Verify every internal invariant; ValueError names the first one broken."""
    def save(self) -> bytes:
        """Everything, handles included, with a format version and a checksum; little-endian."""
    @staticmethod
    def load(data: bytes) -> Forest:
        """The forest that `save` wrote; ValueError names what is wrong with other bytes."""
    def __eq__(self, other: object) -> bool:
        """Same contents and handles, and the same handles for whatever comes next."""

# -- signals --

class Threshold:
    def __init__(self, q: float = -1.0, value: float = 0.0) -> None: ...
    @property
    def q(self) -> float: ...
    @property
    def value(self) -> float: ...

class SignalSpec:
    """The settings of csrc/tree/signals.h; a threshold that is None has no say."""

    smooth_window: int
    group_window: int
    tail_window: int
    min_tokens: int
    warmup_traces: int
    history: int
    fork: bool
    entropy_high: Threshold
    entropy_low: Threshold
    confidence_fork: Threshold | None
    entropy_rise: Threshold | None
    alpha: float
    beta: float
    width_min: int
    width_max: int
    cooldown: int
    max_forks: int
    prune: bool
    confidence_low: Threshold | None
    tail_low: Threshold | None
    entropy_spike: Threshold | None
    decline_run: int
    spike_run: int
    def __init__(self) -> None: ...

class Observed:
    @property
    def smooth_entropy_B(self) -> NDArray[np.float32]: ...
    @property
    def entropy_rise_B(self) -> NDArray[np.float32]: ...
    @property
    def group_confidence_B(self) -> NDArray[np.float32]: ...
    @property
    def tail_confidence_B(self) -> NDArray[np.float32]: ...
    @property
    def min_confidence_B(self) -> NDArray[np.float32]: ...
    @property
    def width_B(self) -> NDArray[np.int32]: ...
    @property
    def prune_B(self) -> NDArray[np.uint8]: ...
    @property
    def ready_B(self) -> NDArray[np.uint8]: ...

class Thresholds:
    @property
    def calibrated(self) -> bool: ...
    @property
    def entropy_high(self) -> float: ...
    @property
    def entropy_low(self) -> float: ...
    @property
    def confidence_fork(self) -> float: ...
    @property
    def entropy_rise(self) -> float: ...
    @property
    def confidence_low(self) -> float: ...
    @property
    def tail_low(self) -> float: ...
    @property
    def entropy_spike(self) -> float: ...

class Sketch:
    def __init__(self, steps: int = 4) -> None: ...
    def add(self, values: NDArray[np.float64]) -> None: ...
    def next_step(self) -> None: ...
    def count(self) -> int: ...
    def quantile(self, q: float) -> float: ...
    def quantile_above(self, q: float) -> float: ...

class Signals:
    def __init__(self, spec: SignalSpec) -> None: ...
    def begin_step(self) -> None: ...
    def calibrate(self) -> None: ...
    def observe(
        self,
        branch_B: NDArray[np.int64],
        entropy_B: NDArray[np.float32],
        confidence_B: NDArray[np.float32],
    ) -> Observed: ...
    def inherit(self, parent: int, child_B: NDArray[np.int64]) -> None: ...
    def rewind(
        self, branch: int, entropy_T: NDArray[np.float32], confidence_T: NDArray[np.float32]
    ) -> None: ...
    def close(self, branch_B: NDArray[np.int64]) -> None: ...
    def thresholds(self) -> Thresholds: ...
    def save(self) -> bytes: ...
    def load(self, state: bytes) -> None: ...

# -- trees without replacement --

class Growth:
    """What one token of each branch decides: siblings to open, and branches to drop."""

    @property
    def parent_B(self) -> NDArray[np.int64]:
        """A sibling opens before the last token of each of these, and never draws that token."""
    @property
    def log_mass_B(self) -> NDArray[np.float64]:
        """Of each sibling, to be given to `Forest.stand`."""
    @property
    def gumbel_B(self) -> NDArray[np.float64]: ...
    @property
    def dropped_B(self) -> NDArray[np.int64]:
        """Open or finished branches that are no longer among the question's largest."""

def draw_roots(forest: Forest, trunk_B: NDArray[np.int64]) -> None:
    """Give new trunks, one to a tree, their Gumbel numbers, by their seeds."""

def grow(
    forest: Forest,
    votes: int,
    branch_B: NDArray[np.int64],
    logprob_B: NDArray[np.float32],
    rest_logprob_B: NDArray[np.float32],
) -> Growth:
    """Follow the law (arXiv:1903.06059) by the last token of each of these branches.

    `logprob_B`: of the token in the distribution that was drawn from; `rest_logprob_B`: log of the
    mass of what neither it nor an earlier sibling at its place is. ValueError for NaN.
    """

def weigh(forest: Forest) -> None:
    """Set the weight of every leaf: probability over inclusion probability, 1 in sum in a tree."""

# -- pack --

class PackedRows:
    """N leaves as one row of I inputs without padding, and their T response tokens in order."""

    @property
    def input_I(self) -> NDArray[np.int64]:
        """Prompt and response of each leaf, concatenated."""
    @property
    def position_I(self) -> NDArray[np.int64]:
        """From 0 in each leaf."""
    @property
    def cu_seqlens(self) -> NDArray[np.int32]:
        """N + 1 offsets into I, as attention kernels for packed sequences take them."""
    @property
    def label_T(self) -> NDArray[np.int64]: ...
    @property
    def leaf_T(self) -> NDArray[np.int64]:
        """Ordinal of the leaf in the call's `leaf_N`."""
    @property
    def segment_T(self) -> NDArray[np.int64]:
        """Ordinal of the segment in `Forest.segments(leaf_N)`."""
    @property
    def logprob_T(self) -> NDArray[np.float32]: ...
    @property
    def entropy_T(self) -> NDArray[np.float32]: ...
    @property
    def confidence_T(self) -> NDArray[np.float32]: ...
    @property
    def forced_T(self) -> NDArray[np.bool_]: ...

def pack_flat(forest: Forest, leaf_N: NDArray[np.int64]) -> PackedRows: ...

class PackedTree:
    """N rows as a tree: what rows have in common from their first token on is stored once.

    J inputs of a forward pass, depth first, in S segments without a fork inside; U response tokens
    that differ in their place; the T response tokens of the rows. The last token of a row that no
    row goes beyond predicts nothing: it is a label, not an input.
    """

    @property
    def input_J(self) -> NDArray[np.int64]: ...
    @property
    def position_J(self) -> NDArray[np.int64]:
        """Tokens above each, the prompt's included."""
    @property
    def begin_S(self) -> NDArray[np.int64]:
        """The first input of each segment; ascending."""
    @property
    def end_S(self) -> NDArray[np.int64]:
        """One past the last input in or below each segment: input k is seen from k to there."""
    @property
    def parent_S(self) -> NDArray[np.int64]:
        """The segment above each, -1 for a root."""
    @property
    def predictor_U(self) -> NDArray[np.int64]:
        """The input whose logits predict each response token; at a fork it has several."""
    @property
    def label_U(self) -> NDArray[np.int64]: ...
    @property
    def unique_T(self) -> NDArray[np.int64]:
        """Which of the U each response token of the rows is: `column_U[unique_T]` is [T]."""
    @property
    def order_N(self) -> NDArray[np.int64]:
        """The rows, depth first."""
    @property
    def added_N(self) -> NDArray[np.int64]:
        """Tokens of each row that no row before it in `order_N` has."""

def pack_tree(forest: Forest, leaf_N: NDArray[np.int64]) -> PackedTree:
    """Leaves of a forest, which share what it stores once."""

def pack_rows(
    token_I: NDArray[np.int64],
    offset_N1: NDArray[np.int64],
    prompt_N: NDArray[np.int64],
    share: bool = True,
) -> PackedTree:
    """Rows of token ids, which share what they have in common, whatever question they belong to.

    Row n is `token_I[offset_N1[n]:offset_N1[n + 1]]`, of which the first `prompt_N[n]` (at least 1)
    are its prompt. Rows that do not `share` are trees of their own, equal ones too.
    """

class BlockMask:
    """Which of B blocks of keys each of B blocks of queries sees.

    A row of a [B * B] column begins with the indices that count, ascending.
    """

    @property
    def partial_count_B(self) -> NDArray[np.int32]: ...
    @property
    def full_count_B(self) -> NDArray[np.int32]: ...
    @property
    def partial_BB(self) -> NDArray[np.int32]:
        """Blocks of which some pairs are seen."""
    @property
    def full_BB(self) -> NDArray[np.int32]:
        """Blocks of which every pair is seen."""

def block_mask(end_J: NDArray[np.int64], block: int = 128) -> BlockMask:
    """The blocks of the rule "key k is seen by the queries from k to end_J[k] - 1"."""

# -- advantage --

class BaselineOptions:
    """The record of csrc/tree/advantage.h; a field that is not given has its default."""

    fields: ClassVar[tuple[str, ...]]
    def __init__(
        self,
        *,
        scale: Literal["none", "std"] = ...,
        ddof: int = ...,
        eps: float = ...,
        leave_one_out: bool = ...,
        single: Literal["zero", "reward"] = ...,
    ) -> None: ...

class AncestorOptions:
    """The record of csrc/tree/advantage.h; a field that is not given has its default."""

    fields: ClassVar[tuple[str, ...]]
    def __init__(
        self,
        *,
        ancestors: Literal["root", "root+parent", "root+trunk", "all"] = ...,
        weight: Literal["one", "mean", "leaves", "std"] = ...,
        per: Literal["leaf", "segment"] = ...,
        leave_one_out: bool = ...,
        sqrt_leaves: bool = ...,
        ddof: int = ...,
        eps: float = ...,
        single: Literal["zero", "reward"] = ...,
    ) -> None: ...

def group_advantage(
    group_N: NDArray[np.int64], reward_N: NDArray[np.float64], options: BaselineOptions
) -> NDArray[np.float64]: ...
def group_mean(group_N: NDArray[np.int64], value_N: NDArray[np.float64]) -> NDArray[np.float64]: ...
def whiten(value_T: NDArray[np.float64], eps: float) -> NDArray[np.float64]: ...
def ancestor_advantage(
    parent_S: NDArray[np.int64],
    leaf_segment_N: NDArray[np.int64],
    group_N: NDArray[np.int64],
    reward_N: NDArray[np.float64],
    options: AncestorOptions,
) -> NDArray[np.float64]: ...
def treerl_released_advantage(
    parent_S: NDArray[np.int64],
    length_S: NDArray[np.int64],
    leaf_segment_N: NDArray[np.int64],
    group_N: NDArray[np.int64],
    reward_N: NDArray[np.float64],
    *,
    by_token: bool,
) -> NDArray[np.float64]: ...
