# %% [markdown]
# # Assignment 3 · A key/value cache
#
# A language model that writes a story reads its own words again for every token, unless it keeps their keys and values.
# You write the store that keeps them: one reserved stretch of memory for each sequence. At the end `tiny`, the model
# that ships in the package, tells two stories on it.
#
# **At the end you will be able to**
#
# - say how much memory a token's keys and values take, for any model;
# - write several sequences of different lengths into one store, and let each token see exactly what it may see;
# - read a prompt whole, in chunks, or token by token, with the same result;
# - count the arithmetic that a store saves, and prove your count with a counter that listens to the real operations.
#
# **You need** notebooks 03 (attention), 05 (the decoder-only model) and 06 (the key/value cache).
# **Time**: about 90 minutes. No GPU.
#
# There are 100 points:
#
# | task | you write | points |
# | --- | --- | --- |
# | 1 | `bytes_per_token` | 10 |
# | 2 | `write` | 15 |
# | 3 | `visible` | 15 |
# | 4 | `Store`: room for all (10), attention (20) | 30 |
# | 5 | `pass_flops` | 10 |
# | 6 | `generation_flops` | 10 |
# | 7 | nothing more: your store at work | 10 |
#
# Replace each `raise NotImplementedError()`. The cell behind a task checks it and says what is wrong and where. Further
# checks with fresh random numbers are run when you have handed in. They close the package's own answers (such as
# `ContiguousCache`) while your code runs, so write your own. A mistake costs its own task, and task 7, where all pieces
# work together; the other tasks are graded with right pieces in the place of yours.

# %% tags=["locked:a3_imports"]
import secrets
from typing import Any
from unittest.mock import patch

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import minillm
from minillm.cache.contiguous import ContiguousCache
from minillm.course.checks import check, check_close, check_equal, without
from minillm.errors import CacheFullError, InvalidRequestError
from minillm.transformer.attention import dot_product_attention
from minillm.transformer.decoder import Decoder, DecoderConfig, LayerConfig
from minillm.transformer.generation import generate
from minillm.transformer.kv import PaddedBatch, pad_right
from minillm.transformer.positions import RotaryConfig


def small_config(**sizes: int) -> DecoderConfig:
    """A decoder as `tiny` is one, but smaller: grouped heads, rotary positions, a gated feed-forward network."""
    wanted = {"hidden_size": 12, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "intermediate_size": 20} | sizes
    layers = (LayerConfig(rotary=RotaryConfig(wanted["head_dim"])),) * wanted.pop("num_layers", 2)
    return DecoderConfig(vocab_size=wanted.pop("vocab_size", 30), max_position_embeddings=64, layers=layers, **wanted)


def draw(low: int, high: int, generator: torch.Generator) -> int:
    """A random whole number, low and high included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


# %% [markdown]
# ## Task 1 · How much memory is it? (10 points)
#
# Each layer keeps, for each token, a key and a value for every key/value head (notebook 06, section 5). Grouped queries
# (Ainslie et al. 2023, "GQA") make these heads fewer than the query heads.
#
# `bytes_per_token(config, dtype)` gives the bytes that one token's keys and values take over all layers.
#
# *By hand:* 2 layers, 2 key/value heads of 4 channels, float16 (2 bytes a number). A layer keeps 2 · 4 = 8 numbers for
# the key and 8 for the value, hence 16 numbers or 32 bytes; two layers make **64 bytes**.
#
# *Hints:* `config.num_layers`, `config.num_kv_heads`, `config.head_dim`, `dtype.itemsize`.


# %% tags=["solution:a3_bytes"]
def bytes_per_token(config: DecoderConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values over all layers."""
    ### BEGIN SOLUTION
    numbers_a_layer = 2 * config.num_kv_heads * config.head_dim
    return config.num_layers * numbers_a_layer * dtype.itemsize
    ### END SOLUTION


# %% tags=["tests:a3_bytes_tests:10"]
from minillm.course.checks import check, check_close, check_equal, without

config = small_config(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4)
hint = "Do you count keys and values, key/value heads rather than query heads, every layer, and bytes?"
check_equal(bytes_per_token(config, torch.float16), 64, "bytes_per_token(config, torch.float16)", hint=hint)
check_equal(bytes_per_token(config, torch.float32), 128, "bytes_per_token(config, torch.float32)", hint=hint)
### BEGIN HIDDEN TESTS
seed = secrets.randbelow(2**31)
generator = torch.Generator().manual_seed(seed)
for dtype in (torch.float16, torch.float32, torch.float64):
    kv_heads, group, head_dim = (draw(1, 5, generator) for _ in range(3))
    sizes = {"num_heads": kv_heads * group, "num_kv_heads": kv_heads, "head_dim": 2 * head_dim}
    config = small_config(num_layers=draw(1, 6, generator), **sizes)
    expected = ContiguousCache(config, batch_size=1, max_len=1, dtype=dtype).num_bytes
    with without(
        "minillm.transformer.decoder:DecoderConfig.kv_bytes_per_token", "minillm.cache.contiguous:ContiguousCache"
    ):
        got = bytes_per_token(config, dtype)
    check_equal(got, expected, f"bytes_per_token of {config.num_layers} layers, {sizes}, {dtype} (seed {seed})")
### END HIDDEN TESTS

# %% [markdown]
# ## Task 2 · Write into the slots (15 points)
#
# The store has, for each layer, one tensor of keys and one of values, `[batch, max_len, kv_heads, head_dim]`: for each
# row `max_len` **slots**. The slot of a token is its position in its sequence. Room is reserved for all slots when the
# store is made (Kwon et al. 2023, §3.1, describe systems that do so), and nothing is moved afterwards.
#
# Each call of the model brings some new tokens of every row: a `PaddedBatch`.
#
# - `batch.starts[row]`: how many tokens of that row came in earlier calls, which is the position of its first new one;
# - `batch.lengths[row]`: how many new tokens it brings. Shorter rows are **padded** on the right to `batch.seq_len`.
#
# `write(slots, new, batch)` puts every real token of `new` into its slot, in place. It returns nothing. Padding is
# written nowhere: behind a row's last token there may be no slot left.
#
# *By hand:* one head of one channel, `max_len=5`. Row 0 has 3 tokens already and brings one, row 1 is new and brings
# two. The `·` of row 0 is padding.
#
# | | `new` | `slots` before | `slots` after |
# | --- | --- | --- | --- |
# | row 0 | `7 ·` | `1 2 3 0 0` | `1 2 3 7 0` |
# | row 1 | `8 9` | `0 0 0 0 0` | `8 9 0 0 0` |
#
# *Hints:* a loop over the rows is good enough. `slots[row, a:b] = …` writes in place; `slots = …` only renames.


# %% tags=["solution:a3_write"]
def write(
    slots: Float[Tensor, "batch max_len kv_heads head_dim"],
    new: Float[Tensor, "batch seq kv_heads head_dim"],
    batch: PaddedBatch,
) -> None:
    """Put each real token of `new` into the slot of its position, in place."""
    ### BEGIN SOLUTION
    for row, (start, length) in enumerate(zip(batch.starts, batch.lengths, strict=True)):
        slots[row, start : start + length] = new[row, :length]
    ### END SOLUTION


# %% tags=["tests:a3_write_tests:15"]
from minillm.course.checks import check, check_close, check_equal, without

slots = torch.tensor([[1.0, 2, 3, 0, 0], [0, 0, 0, 0, 0]])[:, :, None, None]  # one head of one channel
new = torch.tensor([[7.0, -1], [8, 9]])[:, :, None, None]
with without("minillm.cache.contiguous:ContiguousCache"):
    write(slots, new, PaddedBatch(starts=(3, 0), lengths=(1, 2)))
expected = torch.tensor([[1.0, 2, 3, 7, 0], [8, 9, 0, 0, 0]])
hint = "Rows are batch, then slot. Is it in place, at each row's own start, and is padding (-1) left out?"
check_close(slots[:, :, 0, 0], expected, "slots", hint=hint)
### BEGIN HIDDEN TESTS
seed = secrets.randbelow(2**31)
generator = torch.Generator().manual_seed(seed)
for _ in range(5):
    rows, kv_heads, head_dim = (draw(1, 4, generator) for _ in range(3))
    lengths = tuple(draw(1, 5, generator) for _ in range(rows))
    batch = PaddedBatch(tuple(draw(0, 6, generator) for _ in range(rows)), lengths)
    slots = torch.randn(rows, batch.end, kv_heads, head_dim, generator=generator)  # the longest row fills its last slot
    new = torch.randn(rows, batch.seq_len, kv_heads, head_dim, generator=generator)
    expected, brought = slots.clone(), new.clone()
    for row, step in batch.is_real().nonzero().tolist():
        expected[row, batch.starts[row] + step] = new[row, step]
    with without("minillm.cache.contiguous:ContiguousCache"):
        write(slots, new, batch)
    check_close(slots, expected, f"slots (after {batch}, seed {seed})", hint=hint)
    check_close(new, brought, f"new (after {batch}, seed {seed})", hint="It is only to be read.")
### END HIDDEN TESTS

# %% [markdown]
# ## Task 3 · Who may see which slots (15 points)
#
# A token sees the slots of its own sequence up to and including its own position, and none later: slots behind it are
# empty, or hold what it must not know (Vaswani et al. 2017, §3.2.3, third item). The new tokens of a row stand at
# positions `start`, `start + 1`, …
#
# `visible(batch)` returns a mask of booleans, `[batch, seq, end]`. `mask[row, step, slot]` is True where the row's new
# token number `step` may see that slot. `end` is `batch.end`: as many slots as the longest sequence needs after this
# call.
#
# *By hand:* the batch of task 2, `starts=(3, 0), lengths=(1, 2)`, has `seq_len` 2 and `end` 4:
#
# | | slot 0 | 1 | 2 | 3 |
# | --- | --- | --- | --- | --- |
# | row 0, token 0 (position 3) | True | True | True | True |
# | row 0, padding | ? | ? | ? | ? |
# | row 1, token 0 (position 0) | True | False | False | False |
# | row 1, token 1 (position 1) | True | True | False | False |
#
# What padding sees matters to nobody, but it must see at least one slot: the softmax of nothing is NaN.
#
# *Hint:* `batch.positions()` is `[batch, seq]`; compare it with the slots' numbers by broadcasting. (For padding it
# repeats the row's last position.)


# %% tags=["solution:a3_visible"]
def visible(batch: PaddedBatch) -> Bool[Tensor, "batch seq end"]:
    """True where a new token may see a slot: up to its own position."""
    ### BEGIN SOLUTION
    return torch.arange(batch.end) <= batch.positions()[:, :, None]
    ### END SOLUTION


# %% tags=["tests:a3_visible_tests:15"]
from minillm.course.checks import check, check_close, check_equal, without

closed = ("minillm.transformer.attention:attention_mask", "minillm.cache.contiguous:ContiguousCache")


def check_visible(batch: PaddedBatch, hint: str) -> None:
    with without(*closed):
        got = visible(batch)
    positions = [[start + step for step in range(batch.seq_len)] for start in batch.starts]
    expected = torch.tensor([[[slot <= at for slot in range(batch.end)] for at in row] for row in positions])
    check(isinstance(got, Tensor), f"visible returned {type(got).__name__}, and should return a tensor. {hint}")
    check_equal(tuple(got.shape), (len(batch.starts), batch.seq_len, batch.end), "the mask's shape", hint=hint)
    check_equal(got.dtype, torch.bool, "the mask's dtype", hint=hint)
    check(bool(got.any(dim=-1).all()), f"the mask lets some token, or padding, see nothing. {hint}")
    padding = ~batch.is_real()[:, :, None]
    check_close(got | padding, expected | padding, f"for {batch} the mask", hint=hint)


hint = "Does a token see itself, and do positions begin at the row's start?"
check_visible(PaddedBatch(starts=(3, 0), lengths=(1, 2)), hint)
### BEGIN HIDDEN TESTS
seed = secrets.randbelow(2**31)
generator = torch.Generator().manual_seed(seed)
for _ in range(5):
    rows = draw(1, 4, generator)
    starts, lengths = (tuple(draw(low, 6, generator) for _ in range(rows)) for low in (0, 1))
    check_visible(PaddedBatch(starts, lengths), f"{hint} (seed {seed})")
### END HIDDEN TESTS

# %% [markdown]
# ## Task 4 · The store (10 + 20 points)
#
# Now the store itself. It keeps the package's protocol (`KVStore` in `minillm/transformer/kv.py`), so every decoder of
# the package can work with it:
#
# - **`__init__`** reserves the room: `self.keys` and `self.values` are lists with one tensor of zeros a layer,
#   `[batch_size, max_len, kv_heads, head_dim]`, in `dtype`.
# - **`begin(batch)`** is called once a pass, before the first layer. It refuses what the store was not made for:
#   another number of rows (`InvalidRequestError`), or a sequence that would need more than `max_len` slots
#   (`CacheFullError`). A refused batch leaves the store as it was. Otherwise `begin` keeps in mind what `attend` needs.
# - **`attend(layer, q, k, v)`** is called once a layer. It writes `k` and `v` into that layer's slots, then lets each
#   `q` attend to the slots that it may see, and returns what comes out, in the shape of `q`.
#
# *By hand:* in a store of `max_len=4`, a row that has 3 tokens may bring one more, and not two. Suppose one head of two
# channels, and three tokens with the keys (0, 0) and the values (2, 0), (4, 0), (9, 0). Now a token comes with query
# (5, 5), key (0, 0) and value (1, 8). Its four scores are 0, its weights 1/4 each, and what comes out is
# ((2 + 4 + 9 + 1) / 4, 8 / 4) = **(4, 2)**. A token sees itself, so it is written before anyone looks.
#
# *Hints:* use your `write` and `visible`. For the arithmetic take
# `dot_product_attention(q, k, v, mask, scale=self.specs[layer].scale)` of the package (assignment 1). It wants heads
# before tokens, `[batch, heads, tokens, head_dim]`, so transpose on the way in and out; and it broadcasts a mask
# `[batch, 1, queries, keys]`. Give it only the slots up to `batch.end`.


# %% tags=["solution:a3_store"]
class Store:
    """Keys and values of `batch_size` sequences, with `max_len` slots reserved for each."""

    remembers = True  # tokens of earlier calls are seen: `generate` brings only what is new

    def __init__(
        self, config: DecoderConfig, batch_size: int, max_len: int, dtype: torch.dtype = torch.float32
    ) -> None:
        self.specs = config.attention_specs  # one a layer
        self.batch_size = batch_size
        self.max_len = max_len
        ### BEGIN SOLUTION
        shape = (batch_size, max_len, config.num_kv_heads, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype) for _ in self.specs]
        self.values = [torch.zeros(shape, dtype=dtype) for _ in self.specs]
        ### END SOLUTION

    def begin(self, batch: PaddedBatch) -> None:
        """Announce one pass's tokens.

        Raises:
            InvalidRequestError: it does not have the rows that the store was made for.
            CacheFullError: a sequence does not fit.
        """
        ### BEGIN SOLUTION
        if len(batch.starts) != self.batch_size:
            raise InvalidRequestError(f"this store has {self.batch_size} rows, not {len(batch.starts)}")
        if batch.end > self.max_len:
            raise CacheFullError(f"{batch.end} tokens do not fit into {self.max_len} slots: make the store larger")
        self.batch = batch
        self.mask = visible(batch)[:, None]
        ### END SOLUTION

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "batch seq heads head_dim"],
        k: Float[Tensor, "batch seq kv_heads head_dim"],
        v: Float[Tensor, "batch seq kv_heads head_dim"],
    ) -> Float[Tensor, "batch seq heads head_dim"]:
        """Write k and v into their slots; attend q to everything that it may see."""
        ### BEGIN SOLUTION
        write(self.keys[layer], k, self.batch)
        write(self.values[layer], v, self.batch)
        seen_k, seen_v = (kept[layer][:, : self.batch.end].transpose(1, 2) for kept in (self.keys, self.values))
        out = dot_product_attention(q.transpose(1, 2), seen_k, seen_v, self.mask, scale=self.specs[layer].scale)
        return out.transpose(1, 2)
        ### END SOLUTION


# %% [markdown]
# **Room for all (10 points).** The next cell makes stores and announces batches that fit and that do not.

# %% tags=["tests:a3_room_tests:10"]
from minillm.course.checks import check, check_close, check_equal, without

closed = ("minillm.cache.contiguous:ContiguousCache", "minillm.transformer.kv:NoCache")
pieces = {}
### BEGIN HIDDEN TESTS
# A mistake in an earlier task has cost its points already: here a right piece stands in.
pieces = {"visible": lambda batch: torch.arange(batch.end) <= batch.positions()[:, :, None]}
### END HIDDEN TESTS


def check_reserved(store: Store, config: DecoderConfig, rows: int, max_len: int, dtype: torch.dtype) -> None:
    for name in ("keys", "values"):
        kept = getattr(store, name, None)
        check(isinstance(kept, list), f"store.{name} should be a list of tensors, one a layer")
        check_equal(len(kept), config.num_layers, f"the number of layers in store.{name}")
        zeros = torch.zeros(rows, max_len, config.num_kv_heads, config.head_dim, dtype=dtype)
        for layer, slots in enumerate(kept):
            check_close(slots, zeros, f"store.{name}[{layer}]", hint="[batch_size, max_len, kv_heads, head_dim]")
    memory = {slots.data_ptr() for slots in (*store.keys, *store.values)}
    check(len(memory) == 2 * config.num_layers, "two lists or layers share one tensor: make a new one for each")


def check_refused(store: Store, batch: PaddedBatch, error: type[Exception]) -> None:
    asked = f"begin({batch}) on a store of {store.batch_size} rows with {store.max_len} slots"
    try:
        store.begin(batch)
    except Exception as raised:
        check(type(raised) is error, f"{asked} raised {raised!r}, and should raise {error.__name__}")
        check(bool(str(raised)), f"the {error.__name__} of {asked} has no message: say what does not fit")
    else:
        check(False, f"{asked} should raise {error.__name__}, and raised nothing")


with patch.dict(globals(), pieces), without(*closed):
    store = Store(small_config(), batch_size=2, max_len=4)
    check_reserved(store, small_config(), 2, 4, torch.float32)
    store.begin(PaddedBatch(starts=(0, 0), lengths=(3, 1)))
    store.begin(PaddedBatch(starts=(3, 1), lengths=(1, 1)))  # four tokens fill four slots
    check_refused(store, PaddedBatch(starts=(3, 1), lengths=(2, 1)), CacheFullError)
    check_refused(store, PaddedBatch(starts=(0,), lengths=(1,)), InvalidRequestError)
### BEGIN HIDDEN TESTS
seed = secrets.randbelow(2**31)
generator = torch.Generator().manual_seed(seed)
with patch.dict(globals(), pieces), without(*closed):
    for dtype in (torch.float16, torch.float64):
        kv_heads, rows, max_len = (draw(2, 5, generator) for _ in range(3))
        config = small_config(num_layers=draw(1, 4, generator), num_heads=2 * kv_heads, num_kv_heads=kv_heads)
        store = Store(config, rows, max_len, dtype)
        check_reserved(store, config, rows, max_len, dtype)
        store.begin(PaddedBatch.full(rows, max_len))
        store.begin(PaddedBatch.full(rows, 1, start=max_len - 1))
        late = (0,) * (rows - 1) + (draw(1, 3, generator),)  # only the last row is too long
        check_refused(store, PaddedBatch(late, (max_len,) * rows), CacheFullError)
        check_refused(store, PaddedBatch.full(rows, max_len + 1), CacheFullError)
        check_refused(store, PaddedBatch.full(rows + 1, 1), InvalidRequestError)
        check_refused(store, PaddedBatch.full(rows - 1, 1), InvalidRequestError)
### END HIDDEN TESTS

# %% [markdown]
# **Attention (20 points).** The next cell first checks the example by hand. Then it gives a small model several
# sequences through your store: whole prompts and single tokens, and prompts in chunks. Whatever the cuts, the logits
# must be those of a model that keeps nothing and reads everything again.

# %% tags=["locked:a3_watched"]
closed_stores = ("minillm.cache.contiguous:ContiguousCache", "minillm.transformer.kv:NoCache")


class Watched:
    """Your store, and a look at everything that it answers."""

    remembers = True

    def __init__(self, *sizes: Any) -> None:
        self.store = Store(*sizes)
        self.reserved = [slots.data_ptr() for slots in (*self.store.keys, *self.store.values)]

    def begin(self, batch: PaddedBatch) -> None:
        self.store.begin(batch)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = self.store.attend(layer, q, k, v)
        check(isinstance(out, Tensor), f"attend returned {type(out).__name__}: is a return missing?")
        check_equal(tuple(out.shape), tuple(q.shape), "the shape of what attend returns", hint="It is that of q.")
        check_equal(out.dtype, q.dtype, "the dtype of what attend returns")
        now = [slots.data_ptr() for slots in (*self.store.keys, *self.store.values)]
        check(now == self.reserved, "attend made new tensors of keys or values: write into those reserved")
        return out


# %% tags=["tests:a3_attend_tests:20"]
from minillm.course.checks import check, check_close, check_equal, without

pieces = {}


### BEGIN HIDDEN TESTS
# A mistake in an earlier task has cost its points already: here right pieces stand in.
def right_write(slots, new, batch):
    row, step = batch.is_real().nonzero(as_tuple=True)
    slots[row, batch.positions()[row, step]] = new[row, step]


pieces = {"write": right_write, "visible": lambda batch: torch.arange(batch.end) <= batch.positions()[:, :, None]}
### END HIDDEN TESTS


@torch.inference_mode()
def check_chunks(config: DecoderConfig, rows: list[list[int]], cuts: list[tuple[int, ...]], hint: str) -> None:
    """Feed `rows` by the store, cuts[pass][row] tokens at a time, and compare with reading everything at once."""
    model = Decoder(config).double()
    model.reset_parameters(std=0.5)  # so large that scores differ
    whole = [model(torch.tensor([row]))[0] for row in rows]
    with without(*closed_stores):
        store = Watched(config, len(rows), max(map(len, rows)), torch.float64)
        seen = [0] * len(rows)
        for lengths in cuts:
            fed = [row[start : start + length] for row, start, length in zip(rows, seen, lengths, strict=True)]
            batch = PaddedBatch(tuple(seen), lengths)
            store.begin(batch)
            logits = model(pad_right(fed), batch.positions(), store)
            for row, (start, length) in enumerate(zip(seen, lengths, strict=True)):
                right = whole[row][start : start + length]
                what = f"logits (row {row}, tokens {start} to {start + length - 1}, fed as {cuts})"
                check_close(logits[row, :length], right, what, rtol=1e-4, atol=1e-5, hint=hint)
            seen = [start + length for start, length in zip(seen, lengths, strict=True)]


hint = "Is every token written before anyone looks, with its own layer's tensors, and is the mask used?"
with patch.dict(globals(), pieces), without(*closed_stores), torch.inference_mode():
    store = Watched(small_config(num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2), 1, 4)
    store.begin(PaddedBatch(starts=(0,), lengths=(3,)))
    values = torch.tensor([[2.0, 0], [4, 0], [9, 0]])[None, :, None]
    store.attend(0, torch.zeros(1, 3, 1, 2), torch.zeros(1, 3, 1, 2), values)
    store.begin(PaddedBatch(starts=(3,), lengths=(1,)))
    q, k, v = (torch.tensor(numbers)[None, None, None] for numbers in ([5.0, 5], [0.0, 0], [1.0, 8]))
    check_close(store.attend(0, q, k, v).flatten(), torch.tensor([4.0, 2]), "what comes out by hand", hint=hint)
with patch.dict(globals(), pieces):
    torch.manual_seed(0)
    prompts = [[3, 1, 4, 1, 5, 9], [2, 7, 1, 8]]
    check_chunks(small_config(), prompts, [(4, 2), (1, 1), (1, 1)], hint)  # prompts, then a token at a time
    check_chunks(small_config(), prompts, [(2, 1), (3, 1), (1, 2)], hint)  # in chunks
### BEGIN HIDDEN TESTS
seed = secrets.randbelow(2**31)
generator = torch.Generator().manual_seed(seed)
with patch.dict(globals(), pieces):
    for passes in (2, 3, 5):
        kv_heads, group = draw(1, 3, generator), draw(1, 3, generator)
        sizes = {"num_heads": kv_heads * group, "num_kv_heads": kv_heads, "head_dim": 2 * draw(1, 4, generator)}
        count = draw(1, 4, generator)
        cuts = [tuple(draw(1, 5, generator) for _ in range(count)) for _ in range(passes)]
        rows = [[draw(0, 29, generator) for _ in range(sum(lengths))] for lengths in zip(*cuts, strict=True)]
        torch.manual_seed(seed)
        check_chunks(small_config(num_layers=3, **sizes), rows, cuts, f"{hint} (seed {seed})")
### END HIDDEN TESTS

# %% [markdown]
# ## Task 5 · The arithmetic of one pass (10 points)
#
# What does all this save? Count. Nearly all of a decoder's arithmetic is in matrix products, and a product of `[n, a]`
# with `[a, b]` takes $n\,a\,b$ multiplications and as many additions: $2nab$ **FLOPs** (notebook 06, section 1).
#
# `pass_flops(config, new, keys)` gives the FLOPs of one pass over `new` tokens of one sequence. Each attends to all
# `keys` slots of the sequence, itself included. (What the mask hides is computed all the same.) Count in each layer
#
# - the projections: to `num_heads` queries, `num_kv_heads` keys and as many values, and back from the heads to
#   `hidden_size`;
# - attention: every query head's product with each key, and the weighted sum of the values;
# - the gated feed-forward network: **three** matrices of `hidden_size` · `intermediate_size` (gate, up, down);
#
# and once a pass the head, `hidden_size` · `vocab_size`, for the **last token only**: generation needs no other logits.
# Everything else (norms, rotary positions, softmax) has no matrix product and is not counted.
#
# *By hand:* 1 layer, hidden 4, 2 query heads and 1 key/value head of 2 channels, intermediate 8, vocabulary 10; 3 new
# tokens that see 5 slots.
#
# | | | FLOPs |
# | --- | --- | --- |
# | to q, k, v | 2 · 3 · 4 · (2 + 1 + 1) · 2 | 192 |
# | attention | 2 · (2 · 3 · 5 · 2) · 2 heads | 240 |
# | back | 2 · 3 · (2 · 2) · 4 | 96 |
# | feed-forward | 2 · 3 · 3 · 4 · 8 | 576 |
# | head | 2 · 1 · 4 · 10 | 80 |
# | together | | **1184** |
#
# PyTorch can count for real, by listening to the operations as they run. This is the judge:


# %% tags=["locked:a3_counter"]
@torch.inference_mode()
def counted_flops(config: DecoderConfig, new: int, keys: int) -> int:
    """The FLOPs of a real pass over the last `new` of `keys` tokens."""
    model = Decoder(config)
    cache = ContiguousCache(config, batch_size=1, max_len=keys)
    batch = PaddedBatch((keys - new,), (new,))
    cache.begin(batch)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the plain form, which is counted
        model.logits(model.hidden(torch.zeros(1, new, dtype=torch.long), batch.positions(), cache)[:, -1])
    return counter.get_total_flops()


# %% tags=["solution:a3_pass_flops"]
def pass_flops(config: DecoderConfig, new: int, keys: int) -> int:
    """FLOPs of the matrix products of one pass over `new` tokens, which attend to `keys` slots each."""
    ### BEGIN SOLUTION
    heads_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    projections = config.hidden_size * (heads_size + 2 * kv_size) + heads_size * config.hidden_size
    feed_forward = 3 * config.hidden_size * config.intermediate_size
    attention = 2 * keys * heads_size
    head = config.hidden_size * config.vocab_size
    return 2 * (config.num_layers * new * (projections + feed_forward + attention) + head)
    ### END SOLUTION


# %% tags=["tests:a3_pass_flops_tests:10"]
from minillm.course.checks import check, check_close, check_equal, without

judges = ("__main__:counted_flops", "torch.utils.flop_counter:FlopCounterMode", "minillm.viz.memory:forward_flops")
hand = small_config(
    num_layers=1, hidden_size=4, num_heads=2, num_kv_heads=1, head_dim=2, intermediate_size=8, vocab_size=10
)


def check_pass(config: DecoderConfig, new: int, keys: int, hint: str) -> None:
    expected = counted_flops(config, new, keys)
    with without(*judges):
        got = pass_flops(config, new, keys)
    check_equal(got, expected, f"pass_flops(config, new={new}, keys={keys})", hint=hint)


hint = "Go through the table of the example: is every product doubled, and the head counted for one token?"
check_equal(counted_flops(hand, new=3, keys=5), 1184, "the counter's own result")
check_pass(hand, 3, 5, hint)
check_pass(hand, 1, 1, hint)
### BEGIN HIDDEN TESTS
seed = secrets.randbelow(2**31)
generator = torch.Generator().manual_seed(seed)
for _ in range(4):
    kv_heads, group, layers = (draw(1, 4, generator) for _ in range(3))
    sizes = {"num_heads": kv_heads * group, "num_kv_heads": kv_heads, "head_dim": 2 * draw(1, 4, generator)}
    sizes |= {name: draw(5, 40, generator) for name in ("hidden_size", "intermediate_size", "vocab_size")}
    new = draw(1, 9, generator)
    check_pass(small_config(num_layers=layers, **sizes), new, new + draw(0, 9, generator), f"{sizes} (seed {seed})")
### END HIDDEN TESTS

# %% [markdown]
# ## Task 6 · What a store saves (10 points)
#
# `generation_flops(config, prompt, written, cached)` gives the FLOPs of writing `written` tokens after a prompt of
# `prompt` tokens, which takes `written` passes. The first pass reads the prompt, and its last token's logits give the
# first new token. The last new token is never read.
#
# - Not `cached`: each pass reads everything so far, again.
# - `cached`: the first pass reads the prompt, each later pass the one token written last, which sees all before it.
#
# *By hand:* a prompt of 4, 3 tokens to write. Without a store the passes are (new, keys) = (4, 4), (5, 5), (6, 6); with
# one they are (4, 4), (1, 5), (1, 6). Add up `pass_flops` of them. In the check a table of counted passes stands in for
# your `pass_flops`, so that a mistake in task 5 does no harm here.


# %% tags=["solution:a3_generation_flops"]
def generation_flops(config: DecoderConfig, prompt: int, written: int, cached: bool) -> int:
    """FLOPs of writing `written` tokens after `prompt` tokens, with a store or without."""
    ### BEGIN SOLUTION
    lengths = range(prompt, prompt + written)  # of what each pass has before it
    first = pass_flops(config, prompt, prompt)
    return first + sum(pass_flops(config, 1 if cached else keys, keys) for keys in lengths[1:])
    ### END SOLUTION


# %% tags=["tests:a3_generation_flops_tests:10"]
from minillm.course.checks import check, check_close, check_equal, without


def check_generation(config: DecoderConfig, prompt: int, written: int, hint: str) -> None:
    model, tokens = Decoder(config), [list(range(prompt))]
    sizes = range(1, prompt + written + 1)
    table = {(new, keys): counted_flops(config, new, keys) for keys in sizes for new in range(1, keys + 1)}

    def look_up(config: DecoderConfig, new: int, keys: int) -> int:
        check((new, keys) in table, f"you ask for a pass of new={new}, keys={keys}, and there is none such. {hint}")
        return table[new, keys]

    for cached in (False, True):
        kv = ContiguousCache(config, 1, prompt + written) if cached else None
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            list(generate(model, tokens, kv, max_tokens=written))
        with without(*judges, "minillm.transformer.generation:generate"), patch.dict(globals(), pass_flops=look_up):
            got = generation_flops(config, prompt, written, cached)
        asked = f"generation_flops(config, prompt={prompt}, written={written}, cached={cached})"
        check_equal(got, counter.get_total_flops(), asked, hint=hint)


hint = "How many passes are there, and how long is the text in the first and in the last of them?"
check_generation(hand, prompt=4, written=3, hint=hint)
### BEGIN HIDDEN TESTS
seed = secrets.randbelow(2**31)
generator = torch.Generator().manual_seed(seed)
for written in (1, draw(2, 5, generator)):
    sizes = {name: draw(10, 30, generator) for name in ("hidden_size", "intermediate_size", "vocab_size")}
    check_generation(small_config(**sizes), draw(1, 5, generator), written, f"{hint} (seed {seed})")
### END HIDDEN TESTS

# %% [markdown]
# With your own formulas, then: what does a store save `tiny`, and what does it cost?

# %%
tiny = minillm.load_model("tiny", dtype="float32", device="cpu").double()
tokenizer = minillm.get_tokenizer("tiny")
again, once = (generation_flops(tiny.config, prompt=20, written=100, cached=cached) for cached in (False, True))
print(f"100 tokens after a prompt of 20: {again / 1e9:.2f} GFLOPs again and again, {once / 1e9:.2f} GFLOPs once,")
kept = 120 * bytes_per_token(tiny.config, torch.float32)
print(f"{again / once:.0f} times fewer, for {kept / 1024:.0f} KiB in float32")

# %% [markdown]
# ## Task 7 · Two stories on your store (10 points)
#
# Nothing more to write. `generate`, the loop of notebook 05, asks your store as it would ask the package's own. Two
# prompts of different length run together, and what comes out must be, token for token, what comes out on the
# package's `ContiguousCache`.

# %% tags=["tests:a3_story_tests:10"]
from minillm.course.checks import check, check_close, check_equal, without

tiny = minillm.load_model("tiny", dtype="float32", device="cpu").double()
tokenizer = minillm.get_tokenizer("tiny")


def stories(prompts: list[list[int]], kv, written: int) -> list[list[int]]:
    steps = generate(tiny, prompts, kv, max_tokens=written)
    return [list(row) for row in zip(*steps, strict=True)]


def check_stories(beginnings: list[str], written: int) -> list[str]:
    prompts = [tokenizer(text).input_ids for text in beginnings]
    room = max(map(len, prompts)) + written
    expected = stories(prompts, ContiguousCache.for_decoder(tiny, len(prompts), room), written)
    with without(*closed_stores):
        got = stories(prompts, Watched(tiny.config, len(prompts), room, torch.float64), written)
    for text, mine, right in zip(beginnings, got, expected, strict=True):
        check_equal(mine, right, f"the tokens after {text!r}", hint="Do the checks of tasks 2 to 4 all pass?")
    return [text + tokenizer.decode(tokens) for text, tokens in zip(beginnings, got, strict=True)]


for story in check_stories(["Once upon a time there was a brave boy called Leo. He", "Once upon a time"], written=60):
    print(f"{story} …\n")
### BEGIN HIDDEN TESTS
names = ["Mia", "Leo", "Ben", "Anna"]
first, second = secrets.SystemRandom().sample(names, 2)
check_stories([f"One evening {first}", f"Once upon a time there was a girl called {second}. She had"], written=24)
### END HIDDEN TESTS

# %% [markdown]
# ## What to hand in
#
# This notebook, saved, under its own name (`a3_kv_cache.ipynb`). Before you do: restart the kernel and run all cells.
# Do not rename the functions and leave the locked cells as they are.
#
# ## If you want to go on
#
# - A **sliding window** (Mistral 7B, §2): a token sees only the last `window` slots. Which line of `visible` changes,
#   and which slots of the store could then be used again?
# - **Beam search** copies sequences: give the store the `reorder` of `ReorderableStore` in `minillm/transformer/kv.py`,
#   and translate numbers with it (notebook 04).
# - Of the slots that you reserved for the two stories, which share held a token at the end? What if you had not known
#   the length, and reserved `tiny`'s whole context? Notebook 07 measures it, and assignment 4 mends it.
