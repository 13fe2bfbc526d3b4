# %% [markdown]
# # 01 · Tokens and embeddings
#
# A model computes with numbers, and a text is letters. Two steps lie between. First the text is cut into pieces from a
# fixed list, and each piece is replaced by its number: a **token**. Then each number is replaced by a row of a table:
# an **embedding**. This notebook builds both steps.
#
# **By the end of this notebook you will be able to**
#
# - write byte-pair encoding yourself, and say why no text is ever unknown to it;
# - predict which texts need many tokens, and what a larger vocabulary costs;
# - explain why looking up a row is a matrix product, and compute the size of any embedding table;
# - look for meaning in a table of embeddings, by neighbours and on a map, and say what such a map hides.
#
# **You need** Python and the product of two matrices. No GPU.
#
# **New here**: notebook [00](00_start_here.ipynb) used tokens as they came; now you make them, and see what a model
# puts in their place.
#
# **Time**: about 60 minutes (it runs in about 20 s on two cores).

# %%
import random
import sys
from collections import Counter

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import minillm
from minillm.training.stories import tell
from minillm.viz import (
    explore_merges,
    nearest,
    plot_merges,
    plot_one_hot,
    plot_pieces,
    plot_tokens_per_word,
    plot_word_maps,
    principal_plane,
    readable,
    show_source,
)

# %% [markdown]
# ## 1 · Text as numbers
#
# A computer has numbers for letters already. **Unicode** gives each character of every script a number, its *code
# point*. A file holds bytes, so a code point is written as one to four of them. The usual way to do so is **UTF-8**.

# %%
for character in "aé中🙂":
    as_bytes = list(character.encode("utf-8"))
    print(f"{character}  code point {ord(character):,}, UTF-8: {len(as_bytes)} byte(s) {as_bytes}")
print(f"code points that Unicode has room for: {sys.maxunicode + 1:,}")

# %% [markdown]
# So why not give these numbers to the model? What we choose decides two things: **how long** a text becomes, and **how
# many different numbers** there are. Length costs time and memory, since a model works on every token and remembers
# each. And every different number needs a row in a table that has to be learned.
#
# - **Characters**: a text of 1,000 letters is 1,000 tokens. And of more than a million possible code points, most of
#   them are so rare that no training text would teach the model what they mean.
# - **Bytes**: only 256 different numbers, and any text at all can be written. But texts become longer still.
# - **Words**: short texts. But there is no end of words.
#
# That last point deserves a look. The package can make up stories for children (`minillm.training.stories`); they are
# the training text of its own small model, `tiny`. Here is one:

# %%
rng = random.Random(0)
stories = [tell(rng).text for _ in range(300)]
print(stories[0])

# %% [markdown]
# Make a list of all words in 300 stories, and use it on a sentence that is in none of them:

# %%
known = {word.strip('.,:?!"') for story in stories for word in story.split()}
print(f"{len(known)} different words in {len(stories)} stories")

sentence = "Mia saw a red kite and a skateboard from Wuhan"
unknown = [word for word in sentence.split() if word not in known]
print("not among them:", unknown)
assert unknown == ["skateboard", "Wuhan"]

# %% [markdown]
# A model of whole words could read this sentence only with holes in it. A larger list helps, but names, numbers, typing
# errors and new words never end, and with the list grows the table.
#
# What we want lies between bytes and words: **whole words where they are frequent, smaller pieces where they are rare,
# and single bytes where nothing else is left.**

# %% [markdown]
# ## 2 · Byte-pair encoding
#
# Sennrich et al. (2016, §3.2) find such a list, for machine translation, with an old method of data compression
# (Gage 1994): *start from single symbols; join the most frequent pair of neighbours into a new symbol; again, and
# again.* Radford et al. (2019, §2.2), for GPT-2, start from the 256 bytes instead of characters. Most of
# today's language models do it in this or a similar way.
#
# ### Words first
#
# Left to itself, the method would join the end of one word with the beginning of the next wherever that is frequent
# ("dog.", "of the"). So the text is cut into words before, and no merge crosses a cut. GPT-2's rule is a regular
# expression. Note that a word takes the space before it along.

# %%
import regex

from minillm.tokenizers.bpe import GPT2_PATTERN, count_words, cut

print(GPT2_PATTERN)
text = "Sam's kite flew away. Oh no!"
print([word for word, _ in cut(text, regex.compile(GPT2_PATTERN))])

# %% [markdown]
# From here on, no more of the stories is needed than how often each word occurs:

# %%
counted = count_words(stories, GPT2_PATTERN)
print(f"{sum(counted.values()):,} words, {len(counted)} different ones; the commonest:")
print(Counter(counted).most_common(8))

# %% [markdown]
# What are Ġ and Ċ? A word is kept as its *bytes*, and to print bytes (a space, the end of a line) they need a visible
# form. GPT-2's authors chose one letter for each of the 256: printable ones stand for themselves, a space became Ġ, the
# end of a line Ċ. It is only a way of writing. You will meet it in the files of many models.

# %%
from minillm.tokenizers.bpe import letter_bytes, to_letters

for text in (" kite", " é", "中"):
    print(f"{text!r}: bytes {list(text.encode())}, written {to_letters(text)}")

# %% [markdown]
# (In pictures and lists, this notebook turns the letters back: a space is ␣, the end of a line ↵.)
#
# ### Count the pairs
#
# Now every word becomes a list of numbers, one a byte. `pair_counts` goes through all words and counts neighbours, each
# as often as its word occurs.

# %%
from minillm.tokenizers.bpe import merge_pair, pair_counts

pieces = sorted(letter_bytes())  # the vocabulary so far: 256 letters for 256 bytes
ids = {letter: number for number, letter in enumerate(pieces)}
words = [[ids[letter] for letter in word] for word in counted]
times = list(counted.values())

counts = Counter(pair_counts(words, times))
for (left, right), count in counts.most_common(5):
    print(f"{readable(pieces[left])} then {readable(pieces[right])}: {count:,} times")

# %% [markdown]
# ### Merge the winner
#
# The most frequent pair becomes a new piece with a new number, everywhere. That is the whole step:

# %%
show_source(merge_pair)

# %% [markdown]
# And the algorithm is: count, merge the winner, repeat. (Of equally frequent pairs the package takes the one with the
# lower numbers, so that everybody gets the same result.) Watch the first twelve merges, and the length of the text:

# %%
by_hand = []
for _ in range(12):
    counts = pair_counts(words, times)
    pair = max(counts, key=lambda pair: (counts[pair], -pair[0], -pair[1]))
    left, right = pieces[pair[0]], pieces[pair[1]]
    words = [merge_pair(word, pair, len(pieces)) for word in words]
    pieces.append(left + right)
    by_hand.append((left, right))
    length = sum(count * len(word) for word, count in zip(words, times, strict=True))
    joined = f"{readable(left)} + {readable(right)}"
    print(f"{joined:8s} {counts[pair]:6,} times → the stories are {length:,} tokens long")

# %% [markdown]
# Each merge adds one row to the vocabulary and shortens the text by one token wherever the pair was found. Frequent
# things come first; later merges are built from earlier ones (`␣t`, then `␣the`), and each one saves less.
#
# The package's `learn_merges` is the same loop. It only counts more cleverly: a merge changes few words, so only
# their pairs are counted again.

# %%
from minillm.tokenizers.bpe import learn_merges

show_source(learn_merges)

# %% [markdown]
# Its first merges must be ours. The last ones, with a vocabulary of 1,500, are mostly whole words:

# %%
merges = learn_merges(counted, ids, vocab_size=1500)
assert merges[:12] == by_hand
print(f"{len(merges):,} merges; the last ones:")
print(", ".join(readable(left + right) for left, right in merges[-8:]))

# %% [markdown]
# Here is one sentence after more and more merges. Each box is a token. Follow one word down: bytes join to common
# letter pairs, these to syllables, these to the word with its space.

# %%
sentence = "Mia had a golden umbrella and was proud."
counts = [0, 10, 50, 100, 200, 400, 700, 1000, len(merges)]
plot_merges(sentence, merges, counts, title="From bytes to words: the same sentence, more and more merges")
plt.show()

# %% [markdown]
# With a running kernel you can type a text of your own and move the slider:

# %% tags=["nbval-ignore-output"]
explore_merges("Mia went to the beach with her friend Omar.", merges)

# %% [markdown]
# ### Cutting a new text
#
# Learning is done once. To cut a text later, no counts are needed, only the list of merges and its order. Within each
# word, of all neighbours that have a merge, the pair that was *learned first* is joined; and so on until none is left.

# %%
from minillm.tokenizers.bpe import encode_word

show_source(encode_word)

# %% [markdown]
# ### How large should the vocabulary be?
#
# The first $n$ merges are by themselves a smaller tokenizer. So we can ask, for every $n$, how many tokens a word needs
# on average: in new stories, which no merge was learned from, and in a text from another world, the first article of
# the Universal Declaration of Human Rights.


# %%
def tokens_per_word(texts, merges):
    """Pieces of a word, on average; here, a full stop is a word too."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    counted = count_words(texts, GPT2_PATTERN)
    tokens = sum(count * len(encode_word(word, ranks)) for word, count in counted.items())
    return tokens / sum(counted.values())


new_stories = [tell(rng).text for _ in range(100)]
article = (
    "All human beings are born free and equal in dignity and rights. They are endowed with reason "
    "and conscience and should act towards one another in a spirit of brotherhood."
)

# %%
sizes = [256, 300, 350, 400, 500, 600, 700, 800, 1000, 1250, 1500]
curves = {
    "human rights": [tokens_per_word([article], merges[: size - 256]) for size in sizes],
    "new stories": [tokens_per_word(new_stories, merges[: size - 256]) for size in sizes],
}
title = "Each merge helps less than the one before, and helps familiar text most"
plot_tokens_per_word(sizes, curves, title=title)
plt.show()

# %% [markdown]
# The ends of the curves in numbers:

# %%
for name, curve in curves.items():
    print(f"{name}: {curve[0]:.2f} tokens a word as bytes, {curve[-1]:.2f} with {sizes[-1]:,} tokens")
assert all(curve == sorted(curve, reverse=True) for curve in curves.values())
assert curves["new stories"][-1] < 1.1 < 2 < curves["human rights"][-1]

# %% [markdown]
# Two things to take from the picture. The curves fall steeply and then hardly at all, while every further row costs the
# same: so vocabularies end somewhere, for real models between about 30,000 and 260,000. And **a tokenizer fits the text
# it was trained on.** On other text it needs more tokens for the same words; a language that was rare in its training
# text is slower, and where tokens are paid for, dearer.
#
# ### The whole tokenizer
#
# `BytePairTokenizer` puts the parts together: cut into words, merge, look up the numbers. Besides, it knows **special
# tokens**, which no merge makes: marks that mean something to the model and never appear in ordinary text, such as
# "here a text ends". We reserve one.

# %%
from minillm.tokenizers.bpe import BytePairTokenizer

END = "<|endoftext|>"
own = BytePairTokenizer.train(stories, 1500, special_tokens=[END])
assert own.merges == merges[: 1500 - 256 - 1]  # one row less for merges: it is the special token's

tokens = own.encode(" The kite was gone!" + END)
print(tokens)
print(repr(own.decode(tokens)))

# %% [markdown]
# How does it cut what it knows, and what it does not know? `own.vocab` maps pieces to numbers; `in_pieces` shows the
# cuts.


# %%
piece_of = {number: piece for piece, number in own.vocab.items()}


def in_pieces(text):
    return [piece_of[token] for token in own.encode(text)]


texts = {
    "a word of the stories": " umbrella",
    "a name of the stories": " Leila",
    "an unknown word": " skateboard",
    "an unknown name": " Wuhan",
    "two Chinese characters": "你好",
    "an emoji": "🙂",
    "a special token": END,
}
rows = {name: in_pieces(text) for name, text in texts.items()}
title = "Known words are one token; unknown ones fall into pieces, at last into bytes"
plot_pieces(rows, special=[END], title=title)
plt.show()

# %% [markdown]
# A byte that is no whole character is written `\xe4`, as in Python. Count the pieces, and decode them:

# %%
for name, text in texts.items():
    tokens = own.encode(text)
    assert own.decode(tokens) == text
    print(f"{name}: {len(tokens)} token(s) for {len(text.encode())} bytes")

# %% [markdown]
# Nothing is unknown, and nothing is lost: `decode` gives every text back, byte for byte. The price shows in the last
# rows. No story holds Chinese, so there are no merges for it, and each character costs three tokens, one a byte. A
# single one of them is no character at all:

# %%
first, *_ = own.encode("你好")
print(f"token {first} alone decodes to {own.decode([first])!r}")

# %% [markdown]
# (�, U+FFFD, is what Unicode puts where bytes make no sense. A program that prints a model's answer token by token has
# to hold such halves back until the rest has come.)
#
# **Special tokens are found in any text**, also in what a user types: this tokenizer, like many libraries, makes the
# string `<|endoftext|>` one token wherever it stands. Whoever builds a service must decide whether users may write it.

# %%
plot_pieces({"": in_pieces("The end." + END + "The sun")}, special=[END])
plt.show()

# %% [markdown]
# ### A file that others read
#
# A tokenizer is a vocabulary, a list of merges, the rule that cuts words, and special tokens. `save` writes them as
# `tokenizer.json`, the format of Hugging Face's library `tokenizers`, which is written in Rust and used nearly
# everywhere. It reads our file and gives the same numbers:

# %%
import tempfile
from pathlib import Path

from tokenizers import Tokenizer

with tempfile.TemporaryDirectory() as folder:
    own.save(Path(folder) / "tokenizer.json")
    theirs = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))

difficult = [*new_stories, article, "你好 🙂 naïve  \n\t 12,345" + END]
for text in difficult:
    assert own.encode(text) == theirs.encode(text).ids
print(f"{len(difficult)} texts, the same numbers from both")

# %% [markdown]
# ## 3 · The tokenizer of `tiny`
#
# `tiny` is the small model that comes with the package. Its tokenizer was made by this very class, from more stories
# and from conversations about them.

# %%
tokenizer = minillm.get_tokenizer("tiny")
special = list(tokenizer.get_added_vocab())
print(f"{len(tokenizer):,} tokens, of which special: {special}")

tokens = tokenizer.encode(stories[0])
words_in_it = len(stories[0].split())
print(f"the story above: {words_in_it} words, {len(tokens)} tokens")

# %% [markdown]
# More tokens than words, since full stops, commas and line ends are tokens too. Here they are:

# %%
plot_pieces({"": tokenizer.convert_ids_to_tokens(tokens)}, title="A story as tiny sees it")
plt.show()

# %% [markdown]
# Look closely: a word at the start of a line and the same word behind a space are *different* tokens, with different
# numbers. The model has to learn from the texts that they mean the same.

# %%
for text in ("Sam", " Sam"):
    print(f"{text!r:7}: {tokenizer.encode(text)}")
assert tokenizer.encode("Sam") != tokenizer.encode(" Sam")

# %% [markdown]
# For a conversation, special tokens do the work of a script's stage directions: `<|im_start|>` and a role begin a turn,
# `<|im_end|>` closes it. This way of writing is called ChatML; it is the model's **chat template**, and the model was
# trained on it. The last line is where the model goes on. When it writes `<|im_end|>`, its answer is complete.

# %%
beginning = stories[0].splitlines()[0]
chat = [{"role": "user", "content": f"{beginning}\n\nWho is the story about?"}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
pieces = tokenizer.convert_ids_to_tokens(prompt)
plot_pieces({"": pieces}, special=special, title="A question in the chat template; special tokens are dark")
plt.show()

# %% [markdown]
# ## 4 · From a number to a vector
#
# Token 700 is not twice token 350: the numbers are names, and computing with them would be nonsense. A model needs for
# each token a *vector*, whose entries training can move. So it has a table with one row a token, the **embedding
# table**, and replaces each token by its row.

# %%
model = minillm.load_model("tiny", dtype="float32", device="cpu")
table = model.embedding.weight.detach()  # [vocab, hidden]
print("table:", list(table.shape))

tokens = torch.tensor(tokenizer.encode("Once upon a time"))
vectors = table[tokens]  # [seq, hidden]
print("tokens:", list(tokens.shape), "→ vectors:", list(vectors.shape))
assert torch.equal(vectors, model.embedding(tokens))

# %% [markdown]
# ### A lookup is a matrix product
#
# Here is the same thing said in another way. Write a token as a **one-hot** vector: as long as the vocabulary, 1 at the
# token's number and 0 elsewhere. Multiply it with the table. Every row is multiplied by 0, except one: what comes out
# is that row. A toy example with a vocabulary of six:

# %%
names = ["the", "dog", "cat", "sat", "saw", "mat"]
toy_tokens = torch.tensor([0, 2, 4, 0, 1])  # the cat saw the dog
torch.manual_seed(0)
toy_table = torch.randn(6, 8)
plot_one_hot(toy_tokens, toy_table, names, title="One 1 in each row on the left picks one row of the table")
plt.show()

# %% [markdown]
# And with the real table:

# %%
one_hot = F.one_hot(tokens, len(table)).float()  # [seq, vocab]
assert torch.equal(one_hot @ table, table[tokens])

vocab_size, hidden_size = table.shape
print(f"one token by a product: {vocab_size * hidden_size:,} multiplications")
print(f"one token by a lookup:  0 multiplications, {hidden_size} numbers copied")

# %% [markdown]
# So an embedding is an ordinary linear layer whose input happens to be one-hot. It is learned like any other matrix;
# the lookup is only the fast way to compute it. It also tells how the table learns: rows that are multiplied by 0 get a
# gradient of 0. A lookup gives a gradient only to the rows of the tokens that are in the text (exercise 3).
#
# ### How large is it?
#
# An embedding of width 512 is 512 *numbers*. In float32 each takes 4 bytes:

# %%
embedding = torch.zeros(512)
print(f"{embedding.numel()} numbers × {embedding.element_size()} bytes = {embedding.nbytes:,} bytes")
assert embedding.nbytes == 2048

# %% [markdown]
# And a table is vocabulary × width of them. Some real ones (1 MiB is 2²⁰ bytes):

# %%
tables = {
    "tiny": tuple(table.shape),
    "GPT-2 (124M)": (50_257, 768),
    "SmolLM2-135M": (49_152, 576),
    "Llama 3 8B": (128_256, 4096),
}
for name, (rows, width) in tables.items():
    numbers = rows * width
    size = {kind: numbers * kind.itemsize / 2**20 for kind in (torch.float32, torch.bfloat16)}
    print(f"{name:12}  {rows:7,} × {width:5,} = {numbers:11,} numbers", end=", ")
    print(f"{size[torch.float32]:7,.1f} MiB in float32, {size[torch.bfloat16]:7,.1f} in bfloat16")

# %% [markdown]
# In small models the table is a large part of everything. That is another reason not to choose the vocabulary as large
# as possible:

# %%
parameters = sum(parameter.numel() for parameter in model.parameters())
print(f"tiny: {table.numel() / parameters:.0%} of {parameters:,} parameters")
print(f"GPT-2: {50_257 * 768 / 124_439_808:.0%} of 124,439,808")

# %% [markdown]
# ### One table for two ends
#
# At the other end, the model has to score every token of the vocabulary as the next one: from a vector of the hidden
# size to as many numbers as there are tokens. That takes a matrix of the same shape as the table. Press & Wolf (2017)
# and others proposed to use *the same* matrix: a token's score is the dot product of the model's last vector with the
# token's embedding. The two are called **tied** (weight tying). GPT-2, SmolLM2 and `tiny` do so; Llama 3 8B has two
# tables.

# %%
assert model.config.tied_head
assert model.head is None
last = torch.randn(hidden_size)
assert torch.allclose(model.logits(last), table @ last, atol=1e-4)
print("logits = table × last vector")
untied = 2 * 128_256 * 4096 * 2 / 2**20
print(f"Llama 3 8B, both tables in bfloat16: {untied:,.0f} MiB")

# %% [markdown]
# ## 5 · Embeddings as points
#
# Before training, the rows are random. Nobody tells the model that *red* and *blue* are both colours. But the two stand
# between the same words ("a red kite", "a blue kite"). To predict those words the model must treat them alike, and
# training moves their rows in similar directions. That a word is known by the words around it is an old idea in
# linguistics (Firth 1957); here it becomes geometry.
#
# ### Neighbours
#
# Two vectors are similar when they point in the same direction: their **cosine** is the dot product divided by both
# lengths, 1 for the same direction, 0 for a right angle. `nearest` compares one row with all others.

# %%
show_source(nearest)

# %% [markdown]
# Now ask it for the neighbours of some words, all taken with the space before them, as they stand in a sentence. Before
# you look: which ones do you expect?


# %% tags=["nbval-ignore-output"]
def token_of(word, tokenizer=tokenizer):
    """The token of a word with a space before it; every word that we ask for is one."""
    (token,) = tokenizer.encode(" " + word)
    return token


def show_neighbours(word, table=table, tokenizer=tokenizer):
    found = nearest(table, token_of(word, tokenizer), 5)
    names = [readable(tokenizer.convert_ids_to_tokens(token)) for token, _ in found]
    cosines = [f"{cosine:.2f}" for _, cosine in found]
    print(f"{word:8s}", ", ".join(map(" ".join, zip(names, cosines, strict=True))))


for word in ("red", "Mia", "Tom", "dog", "happy", "three", "rainy", "forest"):
    show_neighbours(word)

# %% [markdown]
# Examples prove little, so let us count. For each word of a kind: of the words of all these kinds, is the nearest one
# of its own kind? The lists of words are those that the stories are made of. As a yardstick, the same question to a
# table of random numbers.

# %%
from minillm.training import story_parts

kinds = {
    "girls": story_parts.GIRLS,
    "boys": story_parts.BOYS,
    "colours": story_parts.COLOURS,
    "animals": story_parts.ANIMALS,
    "feelings": story_parts.FEELINGS,
    "numbers": story_parts.NUMBERS,
    "places": [place.removeprefix("the ") for place in story_parts.PLACES],
}


def shares_of_own_kind(table):
    """For each kind, the share of its words whose nearest word, by cosine, is of that kind."""
    kind_of = [kind for kind, words in kinds.items() for _ in words]
    rows = table[[token_of(word) for words in kinds.values() for word in words]]
    rows = rows / rows.norm(dim=1, keepdim=True)
    closest = (rows @ rows.T).fill_diagonal_(-1).argmax(dim=1).tolist()
    hits = [(kind, kind == kind_of[other]) for kind, other in zip(kind_of, closest, strict=True)]
    return {kind: sum(hit for one, hit in hits if one == kind) / len(kinds[kind]) for kind in kinds}


# %%
torch.manual_seed(0)
random_table = torch.randn_like(table)
trained_shares, random_shares = shares_of_own_kind(table), shares_of_own_kind(random_table)
for kind, words in kinds.items():
    print(f"{kind:9s} {len(words):2d} words: {trained_shares[kind]:4.0%} trained, {random_shares[kind]:4.0%} random")
average = sum(trained_shares.values()) / len(kinds)
print(f"on average {average:.0%}, against {sum(random_shares.values()) / len(kinds):.0%} by chance")
assert min(trained_shares[kind] for kind in ("colours", "places", "feelings")) >= 0.7
assert average > 1.5 * sum(random_shares.values()) / len(kinds)

# %% [markdown]
# Colours, places, feelings lie together, for any of them can stand where another stands. Names do so less: a model that
# must repeat exactly the name that was told has a reason to keep names *apart*. The nearest token of a name is often
# the same name in its other form, with or without a space before it. Training shapes a table for its task, not for our
# eyes.

# %% [markdown]
# ### A map
#
# A point in 192 dimensions cannot be drawn. But we can choose the plane in which the points are spread most and look at
# their shadows on it: **principal component analysis**, here by a singular value decomposition.

# %%
show_source(principal_plane)

# %% [markdown]
# On the left the words of `tiny`, on the right as many random vectors, treated in the same way:

# %%
drawn = {kind: words[:9] for kind, words in kinds.items() if kind != "places"}
words = [word for kind in drawn.values() for word in kind]
kind_of = [kind for kind, members in drawn.items() for _ in members]
rows = [token_of(word) for word in words]

trained, share = principal_plane(table[rows])
untrained, _ = principal_plane(random_table[rows])
maps = {"embeddings of tiny": trained, "random embeddings": untrained}
title = "Words of some kinds lie together, and nobody told the model of kinds"
plot_word_maps(maps, words, kind_of, title=title)
plt.show()
print(f"the plane on the left keeps {share:.0%} of the spread, the other {1 - share:.0%} is out of sight")

# %% [markdown]
# Do not read too much into such a map. It keeps two directions of 192 and hides the rest: words may lie side by side on
# it and be far apart. Girls and boys are an example. Choose the plane for the names *alone*, and another difference
# may come into view:

# %%
names = story_parts.GIRLS + story_parts.BOYS
is_girl = ["girls"] * len(story_parts.GIRLS) + ["boys"] * len(story_parts.BOYS)
points, share = principal_plane(table[[token_of(name) for name in names]])
chance, _ = principal_plane(random_table[[token_of(name) for name in names]])
maps = {"names, embeddings of tiny": points, "names, random embeddings": chance}
plot_word_maps(maps, names, is_girl, title="The names alone: do girls and boys part?")
plt.show()

# %% [markdown]
# By how much do they part, along the direction from left to right?

# %%
count = len(story_parts.GIRLS)
for name, seen in maps.items():
    across = seen[:, 0]  # the direction of the largest spread
    apart = float((across[:count].mean() - across[count:].mean()).abs() / across.std())
    print(f"{name}: the means of girls and boys are {apart:.1f} standard deviations apart")

# %% [markdown]
# On this plane they hardly part, no more than random vectors do: the directions in which names differ most are others.
# Does the table not know, then? No list of girls was ever part of the training, but after a girl's name the stories say
# *she* and *her*, and a model that predicts these words has to know. So we ask all 192 dimensions, without any plane:
# is a name closer to the mean of the other girls or to the mean of the other boys?


# %%
def share_beside_own(table):
    """The share of names closer to the mean of their own kind (itself left out) than to the other."""
    girls, boys = (table[[token_of(name) for name in kinds[kind]]] for kind in ("girls", "boys"))
    right = 0
    for own, other in ((girls, boys), (boys, girls)):
        others = (own.sum(dim=0) - own) / (len(own) - 1)  # the mean of its kind without the name
        right += ((own - others).norm(dim=1) < (own - other.mean(dim=0)).norm(dim=1)).sum()
    return float(right) / len(names)


print(f"trained {share_beside_own(table):.0%}, random {share_beside_own(random_table):.0%}")
assert share_beside_own(table) > 0.75 > share_beside_own(random_table)

# %% [markdown]
# It knows, and the map did not show it. What the texts connect, embeddings connect, whether anybody meant it or not.
# From texts of the world they learn its prejudices in the same way (Bolukbasi et al. 2016).
#
# ## 6 · A large vocabulary
#
# `tiny` knows one small world. The table of SmolLM2-135M was trained on a good part of the internet. The same functions
# work on it. (`minillm pull smollm2-135m` brings it to your disk; without it, the cells of this section show nothing.)

# %%
from minillm.models.source import is_on_disk

WITH_SMOLLM2 = is_on_disk("smollm2-135m")

# %% tags=["nbval-ignore-output"]
if WITH_SMOLLM2:
    large_tokenizer = minillm.get_tokenizer("smollm2-135m")
    large_model = minillm.load_model("smollm2-135m", dtype="float32", device="cpu")
    large_table = large_model.embedding.weight.detach()
    for word in ("red", "Paris", "happy", "seven", "Monday", "river", "physics"):
        show_neighbours(word, large_table, large_tokenizer)
else:
    print("SmolLM2 is not on this disk; to see it: minillm pull smollm2-135m, then run this section again")

# %% [markdown]
# Look at the first neighbours. Among 49,152 rows a word has several forms (capital letter or small, with a space before
# it or without), and training has given them similar rows. After them come words of the same kind: cities, weekdays,
# sciences. Why are *Monday* and *Tuesday* so near, and *happy* and *unhappy* too? Because they stand in the same
# places. Embeddings know what can replace a word, which is not the same as what it means.
#
# And the map. Look at the numbers, too: does their order mean something?

# %% tags=["nbval-ignore-output"]
large_kinds = {
    "colours": ["red", "blue", "green", "yellow", "white", "black", "brown", "purple"],
    "weekdays": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "numbers": ["two", "three", "four", "five", "six", "seven", "eight", "nine"],
    "cities": ["Paris", "London", "Berlin", "Rome", "Madrid", "Tokyo", "Moscow"],
    "animals": ["dog", "cat", "horse", "cow", "sheep", "bird", "fish"],
}
if WITH_SMOLLM2:
    words = [word for kind in large_kinds.values() for word in kind]
    kind_of = [kind for kind, members in large_kinds.items() for _ in members]
    points, share = principal_plane(large_table[[token_of(word, large_tokenizer) for word in words]])
    title = "Words of SmolLM2-135M"
    plot_word_maps({f"{share:.0%} of the spread": points}, words, kind_of, title=title)
    plt.show()

# %% [markdown]
# One thing embeddings cannot do: a token has *one* row, whatever stands around it. *Orange* the colour and *orange* the
# fruit begin as the same vector. To tell them apart a token has to look at its neighbours in the text. That is what
# attention is for, and what all other layers of the model do.
#
# ## What to take along
#
# | | |
# | --- | --- |
# | token | the number of a piece of text; pieces come from a fixed list |
# | byte-pair encoding | start from bytes, join the most frequent pair, repeat; new text: the same merges, in order |
# | unknown text | does not exist: what has no merges is cut into bytes |
# | special token | a number that no ordinary text has: end of text, begin and end of a turn |
# | embedding | a row of a table; looking it up equals one-hot × table |
# | size | vocabulary × width × bytes a number; 512 float32 numbers are 2,048 bytes |
# | tied | the same table scores the next token |
# | cosine | how alike two rows point; neighbours are words that stand in the same places |
#
# ## Sources
#
# - Sennrich, Haddow & Birch 2016, "Neural Machine Translation of Rare Words with Subword Units": §3.2 is section 2
# - Gage 1994, "A New Algorithm for Data Compression"
# - Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2): §2.2, bytes
# - Press & Wolf 2017, "Using the Output Embedding to Improve Language Models": tied tables
# - Firth 1957, "A Synopsis of Linguistic Theory, 1930–1955"
# - Bolukbasi et al. 2016, "Man is to Computer Programmer as Woman is to Homemaker? Debiasing Word Embeddings"
#
# ## Exercises
#
# Replace each `None`; when the answer is right, the cell says so.
#
# **1.** The example of Sennrich et al. (2016), here without their mark for the end of a word: *low* occurs 5 times,
# *lower* 2, *newest* 6 and *widest* 3 times. Which are the first three merges? Do it on paper. Of equally frequent
# pairs take the one that comes first in the alphabet.

# %%
first_three = None  # for instance [("a", "b"), ("ab", "c"), ("d", "e")]

if first_three is not None:
    toy = {"low": 5, "lower": 2, "newest": 6, "widest": 3}
    alphabet = sorted(set("".join(toy)))
    numbers = {letter: number for number, letter in enumerate(alphabet)}
    right = learn_merges(toy, numbers, vocab_size=len(alphabet) + 3)
    for number, (mine, expected) in enumerate(zip(first_three, right, strict=True), start=1):
        assert tuple(mine) == expected, f"merge {number} is another one: count the pairs again"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `first_three = [("e", "s"), ("es", "t"), ("l", "o")]`. Both *e s* and *s t* occur 6 + 3 = 9 times, and *e* comes
# first. Then *es t* has 9, more than *l o* and *o w* with 7 each. (*w e* began with 8, but after the first merge the
# *e* of *newest* is gone into *es*, and only the 2 of *lower* are left.)
#
# </details>
#
# **2.** You know nothing of a byte-level tokenizer but that it is one. How many tokens can the text `"你好🙂 Mia"` take
# at most?

# %%
at_most = None

if at_most is not None:
    bare = BytePairTokenizer.train([], 256)  # no merges at all
    assert at_most == len(bare.encode("你好🙂 Mia")), "without any merges, what is one token?"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `at_most = 14`, its bytes: 3 for each Chinese character, 4 for the emoji, 1 for the space and for each letter. Merges
# can only make it fewer.
#
# </details>
#
# **3.** A table has 10 rows. We look up the tokens `[5, 2, 5, 9]` and take one step of training. How many rows have a
# gradient that is not 0?

# %%
moved_rows = None

if moved_rows is not None:
    small = torch.nn.Embedding(10, 4)
    small(torch.tensor([5, 2, 5, 9])).square().sum().backward()
    with_gradient = (small.weight.grad != 0).any(dim=1).sum()
    assert moved_rows == with_gradient, "rows that are multiplied by 0 get a gradient of 0"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `moved_rows = 3`: rows 2, 5 and 9. Row 5 gets the sum of two gradients. If the table were tied, all rows would have
# one: every row takes part in the scores of the next token, and the softmax lowers all that are wrong.
#
# </details>
#
# **4.** You design a model of 100 million parameters and width 768, and its tied table may take at most 30 % of them.
# How large can the vocabulary be, if it shall be a multiple of 64 (as fast matrix products like it)?

# %%
largest_vocabulary = None

if largest_vocabulary is not None:
    assert largest_vocabulary % 64 == 0, "a multiple of 64"
    assert largest_vocabulary * 768 <= 30_000_000, "too large"
    assert (largest_vocabulary + 64) * 768 > 30_000_000, "there is room for more"
    print("right")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `largest_vocabulary = 30_000_000 // 768 // 64 * 64`, which is 39,040.
#
# </details>
#
# ---
# **Back:** [00_start_here](00_start_here.ipynb) · **Next:** [02_positions](02_positions.ipynb): a token's vector does
# not say where the token stands. Three ways to tell it.
