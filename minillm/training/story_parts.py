"""What the stories are made of: names, things, places, and the plots that join them.

A sentence is a format string over a story's facts. The facts that every story has are drawn in `stories.draw_facts`; a
plot draws more of its own. Pronouns and verbs follow the hero and the thing: ``{he} {him} {his}`` are the hero's,
``{fhim}`` the friend's, ``{it} {them} {was} {is_}`` the thing's (boots *were*, a kite *was*). A fact's name with a
capital letter is the fact with one.
"""

from __future__ import annotations

from dataclasses import dataclass

GIRLS = (
    "Mia Lily Anna Emma Ruby Nora Ella Lucy Sara Ivy Rosa Zoe Alice Clara Eva Maya Hana Mei Leila Amina Freya Ines"
).split()
BOYS = (
    "Tom Ben Max Leo Sam Jack Finn Noah Omar Paul Hugo Ravi Luca Adam Oscar Felix Kofi Jun Ali Theo Emil Karl"
).split()

COLOURS = "red blue green yellow white black pink brown purple orange golden silver".split()
SINGLE = (
    "kite ball doll boat book hat scarf drum cup lantern basket bell key coat blanket umbrella flute ring puppet "
    "train whistle pillow box bag spoon"
).split()
PLURAL = "boots gloves marbles shoes skates crayons socks".split()
FOODS = (
    "warm bread,apple pie,honey cake,pea soup,nut bread,sweet plums,corn cakes,cheese,rice pudding,berry jam,pancakes,"
    "ginger biscuits"
).split(",")
WEATHER = "sunny rainy windy cloudy snowy foggy warm cold".split()
TIMES = "morning afternoon evening".split()
HELPERS = (
    "the baker,the farmer,the teacher,the old sailor,the gardener,the postman,the miller,the shepherd,the librarian,"
    "the carpenter"
).split(",")
ANIMALS = "crow fox goat dog cat duck monkey goose squirrel raven".split()
FEELINGS = "happy proud glad thankful calm cheerful".split()
TRAITS = "kind brave clever gentle curious patient polite careful".split()
NUMBERS = "two three four five six seven".split()

PLACES: dict[str, tuple[str, ...]] = {
    "the park": ("under a bench", "behind the swings", "near the fountain", "beside a tall tree"),
    "the forest": ("under a pine tree", "behind a mossy rock", "inside a hollow log", "beside a fern"),
    "the beach": ("under a wet towel", "behind a sandy rock", "inside a bucket", "beside a blue boat"),
    "the garden": ("under a rose bush", "behind the shed", "inside a flower pot", "beside the gate"),
    "the market": ("under a table", "behind a cart", "inside a crate", "beside the fish stall"),
    "the farm": ("under the hay", "behind the barn", "inside a milk can", "beside the well"),
    "the hill": ("under a bush", "behind an old wall", "inside a small cave", "beside the path"),
    "the school": ("under a desk", "behind the door", "inside a cupboard", "beside the window"),
    "the lake": ("under a bridge", "behind the reeds", "inside a rowing boat", "beside the pier"),
    "the village": ("under a stone step", "behind the church", "inside a barrel", "beside the bakery"),
}
"""Where a story may happen, and where in that place a lost thing may be."""


@dataclass(frozen=True)
class Plot:
    """One kind of event.

    Attributes:
        event: its name; a held-out combination is (hero's name, thing, event).
        request: what the story tells, as somebody would ask for it.
        draws: for each, one of its entries is drawn and its facts are added.
        beats: for each, one of its sentences (or runs of sentences) is told; None starts a paragraph.
        questions: (question, answer) pairs that this plot's facts decide; questions may share a fact.
        belies: sentences of other stories that would not be true in this one.
    """

    event: str
    request: str
    draws: tuple[tuple[dict[str, str], ...], ...]
    beats: tuple[tuple[str, ...] | None, ...]
    questions: tuple[tuple[str, str], ...]
    belies: tuple[str, ...] = ()


NEVER_WITHOUT_IT = "{He} never left home without {a_thing}."
TAKES_IT_ALONG = "It was a {weather} {time}. {hero} took the {thing} and went to {place} with {friend_full}."


OPENINGS = (
    "Once upon a time there was a {trait} {child} called {hero}.",
    "Once upon a time, in a small house near {home}, lived a {trait} {child} called {hero}.",
    "There was once a {trait} {child} whose name was {hero}.",
    "{hero} was a {trait} {child} who lived near {home}.",
    "Long ago there lived a {trait} {child} called {hero}.",
)
THINGS = (
    "{He} had {a_thing}, and {he} loved {them} very much.",
    "For {his} birthday {he} had been given {a_thing}.",
    NEVER_WITHOUT_IT,
    "Of all that {he} had, {he} liked {a_thing} most.",
)
SETTINGS = (
    "One {weather} {time} {hero} went to {place} with {friend_full}.",
    "One {weather} {time} {he} walked to {place}, and {friend_full} came along.",
    TAKES_IT_ALONG,
    "On a {weather} {time}, {hero} and {friend_full} were at {place}.",
    "One {weather} {time} {he} met {friend_full} at {place}.",
)
ENDINGS = (
    "At the end of the day {hero} felt {feeling}. They sat down together and ate {food}.",
    "They went home and ate {food}. {hero} felt {feeling}.",
    '"Come, let us eat," said {friend}. They ate {food}, and {hero} felt {feeling}.',
    "{hero} felt {feeling} that night. Before bed, they ate {food}.",
    "{hero} was so {feeling} that {he} sang all the way home. There they ate {food}.",
)

COMMON_QUESTIONS = (
    ("Who is the story about?", "The story is about {hero}."),
    ("What colour {was} the {thing}?", "The {thing} {was} {colour}."),
    ("Where did {hero} go?", "{hero} went to {place}."),
    ("Who was with {hero}?", "{friend} was with {hero}."),
    ("What kind of {time} was it?", "It was a {weather} {time}."),
    ("How did {hero} feel at the end?", "{hero} felt {feeling}."),
    ("What did they eat?", "They ate {food}."),
    ("Where did the story happen?", "The story happened at {place}."),
    ("{Was} the {thing} {either_colour}?", "The {thing} {was} {colour}."),
    ("Did {hero} go to {either_place}?", "{hero} went to {place}."),
    ("What kind of {child} was {hero}?", "{hero} was a {trait} {child}."),
)


def _each(name: str, *values: str) -> tuple[dict[str, str], ...]:
    return tuple({name: value} for value in values)


_HELPERS = tuple({"helper": helper} for helper in HELPERS)
_ANIMALS = tuple({"animal": animal} for animal in ANIMALS)

PLOTS = (
    Plot(
        "lost",
        "{hero} loses {a_thing}",
        (
            _each("reason", "there was a hole in {his} pocket", "{he} had run too fast", "{he} had not been careful"),
            _each("finder", "{hero}", "{friend}"),
        ),
        (
            (
                "They played for a long time. Then {hero} looked around. The {thing} {was} gone!",
                "After a while {he} stopped. {He} could not see the {thing} anywhere.",
                "Suddenly {hero} saw that the {thing} {was} missing.",
            ),
            (
                "{hero} had lost the {thing} because {reason}.",
                "Because {reason}, {he} had lost the {thing}.",
            ),
            None,
            (
                '"Why are you sad?" asked {friend}. "I have lost my {thing}," said {hero}.',
                '{hero} began to cry. "What is wrong?" asked {friend}. "My {thing} {is_} gone," said {hero}.',
            ),
            (
                '"Do not worry, I will help you," said {friend}. They looked {wrong_spot}, but there was nothing.',
                '"Then we must look for {them}," said {friend}. First they looked {wrong_spot}. Nothing was there.',
            ),
            (
                "Then {finder} looked {spot}, and there {it} {was}!",
                "At last {finder} found the {thing} {spot}.",
                'Then {finder} called out: "Here {it} {is_}!" The {thing} {was} {spot}.',
            ),
            None,
        ),
        (
            ("What did {hero} lose?", "{hero} lost the {colour} {thing}."),
            ("Why was {hero} sad?", "{hero} was sad because {he} had lost the {thing}."),
            ("Why did {hero} lose the {thing}?", "{hero} lost the {thing} because {reason}."),
            ("Who found the {thing}?", "{finder} found the {thing}."),
            ("Where {was} the {thing}?", "The {thing} {was} {spot}."),
            ("Where did they look first?", "First they looked {wrong_spot}."),
        ),
    ),
    Plot(
        "stuck",
        "{a_thing} {gets} stuck and somebody helps {hero}",
        (
            _each("high", "in a tall tree", "on a roof", "on a high wall", "on top of a tower"),
            _each("tool", "a ladder", "a long stick", "a rope", "a fishing rod"),
            _HELPERS,
        ),
        (
            (
                "The wind was so strong that it blew the {thing} out of {his} hands.",
                "Suddenly a strong wind came and took the {thing} away.",
                "{hero} threw the {thing} into the air, but {he} threw {them} too high.",
            ),
            ("The {thing} got stuck {high}.", "{It} flew up and up and got stuck {high}."),
            None,
            (
                '"Oh no! What can we do?" said {hero}. "It is too high for us," said {friend}.',
                '{hero} jumped, but {he} was too small. "We need help," said {friend}.',
            ),
            (
                "{Helper} heard them and came with {tool}.",
                'Just then {helper} came by. "I have {tool}," said {helper}.',
            ),
            (
                "With {tool} {helper} brought the {thing} down.",
                "Soon the {thing} {was} down again, because {tool} was just long enough.",
            ),
            ('"Thank you!" said {hero}.', '"You are so kind," said {hero} to {helper}.'),
            None,
        ),
        (
            ("Where did the {thing} get stuck?", "The {thing} got stuck {high}."),
            ("Who helped {hero}?", "{Helper} helped {hero}."),
            ("What did {helper} use?", "{Helper} used {tool}."),
            ("Who had {tool}?", "{Helper} had {tool}."),
            ("How did the {thing} come down?", "{Helper} brought the {thing} down with {tool}."),
        ),
    ),
    Plot(
        "broken",
        "the {thing} of {hero} {breaks}",
        (
            _each("cause", "{hero} fell over a stone", "{friend} ran into {him}", "{he} dropped {them} on the ground"),
            _each("mend", "glue", "string", "tape", "wire", "a nail", "a needle and thread"),
            _HELPERS,
        ),
        (
            (
                "They were having fun. But then {cause}, and the {thing} broke.",
                "All went well until {cause}. Crack! The {thing} {was} broken.",
            ),
            None,
            (
                '"I am so sorry," said {friend}. {hero} could not speak. {He} felt sad because the {thing} {was} broken.',
                '"Look, {it} {is_} broken!" said {hero}, and {he} cried. "Maybe somebody can mend {them}," said {friend}.',
            ),
            (
                "They took the {thing} to {helper}. {Helper} mended {them} with {mend}.",
                'They went to {helper}. "I know what to do," said {helper}, and mended {them} with {mend}.',
            ),
            (
                "Soon the {thing} {was} as good as new.",
                "When {helper} had finished, nobody could see where {it} had been broken.",
            ),
            None,
        ),
        (
            ("Why did the {thing} break?", "The {thing} broke because {cause}."),
            ("Who mended the {thing}?", "{Helper} mended the {thing}."),
            ("What did {helper} use?", "{Helper} used {mend}."),
            ("Why was {hero} sad?", "{hero} was sad because the {thing} {was} broken."),
        ),
    ),
    Plot(
        "shared",
        "{hero} and a friend both want {a_thing}",
        (
            _each("turns", "until lunch", "for one hour", "until the bell rang", "until sunset"),
            ({"first": "{hero}", "second": "{friend}"}, {"first": "{friend}", "second": "{hero}"}),
        ),
        (
            (
                '"May I play with your {thing}?" asked {friend}. "No, {it} {is_} mine," said {hero}.',
                '{friend} wanted to hold the {thing}. "No, I want to keep {them}," said {hero}.',
            ),
            (
                "Then {friend} turned away and was quiet. {hero} saw it and was sorry.",
                "{friend} looked so sad that {hero} could not be happy any more.",
            ),
            None,
            (
                '"We can take turns," said {hero}. So {first} had the {thing} first, {turns}.',
                '"Let us share," said {hero}. {first} went first and had the {thing} {turns}.',
            ),
            ("After that it was the turn of {second}.", "Then {first} gave the {thing} to {second}."),
            ("They learned that a toy is more fun when it is shared.", "Sharing made both of them glad."),
            None,
        ),
        (
            ("What did {friend} want?", "{friend} wanted the {colour} {thing}."),
            ("Who had the {thing} first?", "{first} had the {thing} first."),
            ("Who had the {thing} after that?", "{second} had the {thing} after that."),
            ("How long did {first} have the {thing}?", "{first} had the {thing} {turns}."),
            ("How did they solve the problem?", "They took turns."),
        ),
    ),
    Plot(
        "gift",
        "{hero} gives {a_thing} to a friend",
        (
            _each(
                "occasion",
                "it was the birthday of {friend}",
                "{friend} had been ill",
                "{friend} was leaving for the city",
                "{friend} had helped {him}",
            ),
            _each("wrap", "paper", "a big leaf", "a cloth", "a paper box"),
        ),
        (
            (
                "{hero} wanted to give the {thing} away, because {occasion}.",
                "Because {occasion}, {hero} wanted to give something away: the {thing}.",
            ),
            ("{He} had packed {them} in {wrap}.", "The {thing} {was} hidden in {wrap}."),
            None,
            (
                '"This is for you," said {hero}. {friend} opened it and saw the {thing}.',
                '"I have something for you," said {hero}. "Is it really for me?" asked {friend}, and opened it.',
            ),
            (
                '"Thank you! I will take good care of {them}," said {friend}.',
                '{friend} laughed. "This is the best gift of all," said {friend}.',
            ),
            None,
        ),
        (
            ("What did {hero} give away?", "{hero} gave away the {colour} {thing}."),
            ("Who has the {thing} now?", "{friend} has the {thing} now."),
            ("Why did {hero} give the {thing} away?", "{hero} gave the {thing} away because {occasion}."),
            ("What {was} the {thing} packed in?", "The {thing} {was} packed in {wrap}."),
        ),
    ),
    Plot(
        "thief",
        "an animal takes {a_thing} from {hero}",
        (
            _ANIMALS,
            _each("bait", "a nut", "a berry", "a piece of cheese", "some bread", "a carrot", "a plum"),
            _each("giver", "{hero}", "{friend}"),
        ),
        (
            (
                "Suddenly {a_animal} came, took the {thing}, and ran away.",
                "While they were talking, {a_animal} took the {thing}.",
            ),
            ('"Stop!" cried {hero}.', '"Give {them} back!" cried {hero}. But the {animal} did not listen.'),
            None,
            (
                '"The {animal} is hungry," said {friend}. So {giver} held out {bait}.',
                '"Maybe the {animal} wants to eat," said {friend}. {giver} had {bait} and put it on the ground.',
            ),
            (
                "The {animal} dropped the {thing} and ate. {hero} picked {them} up.",
                "At once the {animal} let the {thing} fall, because it wanted to eat. So {hero} had {them} again.",
            ),
            None,
        ),
        (
            ("Who took the {thing}?", "{A_animal} took the {thing}."),
            ("What did the {animal} get to eat?", "The {animal} got {bait}."),
            ("Who gave food to the {animal}?", "{giver} gave food to the {animal}."),
            ("Why did the {animal} drop the {thing}?", "The {animal} dropped the {thing} because it wanted to eat."),
        ),
    ),
    Plot(
        "water",
        "{a_thing} {falls} into the water and {hero} gets {them} back",
        (
            _each("water", "the river", "a deep pond", "a well", "a stream", "a big puddle"),
            _each("rescuer", "a frog", "a fisherman", "a swan", "a beaver", "a sailor", "a big fish"),
            _each("dry", "in the sun", "by the fire", "on a warm stone", "on a line"),
        ),
        (
            (
                "{hero} slipped on the wet grass, and the {thing} fell into {water}.",
                "The ground was wet. {hero} slipped, and the {thing} fell into {water}.",
            ),
            None,
            (
                '"I cannot swim!" said {hero}. "Nor can I," said {friend}.',
                '"Can you reach {them}?" asked {friend}. "No, {it} {is_} too far away," said {hero}.',
            ),
            (
                "But {rescuer} had seen it and brought the {thing} back.",
                'Then {rescuer} came. "Look what I have!" And {rescuer} gave the {thing} back.',
            ),
            (
                "The {thing} {was} very wet, so they let {them} dry {dry}.",
                "Because the {thing} {was} wet, {hero} put {them} {dry}.",
            ),
            None,
        ),
        (
            ("Where did the {thing} fall?", "The {thing} fell into {water}."),
            ("Who brought the {thing} back?", "{Rescuer} brought the {thing} back."),
            ("Why did {hero} slip?", "{hero} slipped because the ground was wet."),
            ("Where did the {thing} dry?", "The {thing} dried {dry}."),
        ),
    ),
    Plot(
        "swap",
        "{hero} swaps {a_thing} with a friend",
        (
            _each("other", "a wooden horse", "a glass bird", "a stone frog", "a paper star", "a tin soldier"),
            _each(
                "wish", "{he} had always wanted one", "it shone in the light", "it looked so funny", "it was so small"
            ),
        ),
        (
            (
                "{friend} had {other}. {hero} liked it because {wish}.",
                "{friend} had brought {other}. Because {wish}, {hero} could not stop looking at it.",
            ),
            None,
            (
                '"Shall we swap?" asked {hero}. "Your {thing} for {other}? Yes!" said {friend}.',
                '"I would give you my {thing} for it," said {hero}. "Then let us swap," said {friend}.',
            ),
            (
                "So {hero} took {other} home, and {friend} kept the {thing}.",
                "So {friend} got the {thing} and {hero} got {other}.",
            ),
            ("Both of them thought that it was a good swap.", "It was the best swap in the world."),
            None,
        ),
        (
            ("What did {hero} get?", "{hero} got {other}."),
            ("What did {friend} get?", "{friend} got the {colour} {thing}."),
            ("Who has the {thing} now?", "{friend} has the {thing} now."),
            ("Why did {hero} want to swap?", "{hero} wanted to swap because {wish}."),
        ),
    ),
    Plot(
        "forgotten",
        "{hero} forgets {a_thing}",
        (
            _each("left", "at home", "in the attic", "on the bus", "in the kitchen", "at the shop"),
            _each("noticed", "they stopped to rest", "they wanted to play", "it began to rain", "the bell rang"),
            _each("runner", "{hero}", "{friend}"),
        ),
        (
            (
                "When {noticed}, {hero} saw that {he} had left the {thing} {left}.",
                "{Noticed}. Only then {hero} saw that the {thing} {was} not there: {he} had left {them} {left}.",
            ),
            None,
            (
                '"I always forget things," said {hero}. "Everybody forgets something," said {friend}.',
                '"How could I forget {them}?" said {hero}. "It is not far," said {friend}.',
            ),
            (
                "{runner} ran all the way back and fetched the {thing}.",
                "So {runner} went back and came again with the {thing}.",
            ),
            ("Now they could go on.", "This time {hero} held the {thing} tight."),
            None,
        ),
        (
            ("Where did {hero} leave the {thing}?", "{hero} left the {thing} {left}."),
            ("Who fetched the {thing}?", "{runner} fetched the {thing}."),
            ("What did {hero} forget?", "{hero} forgot the {colour} {thing}."),
        ),
        (NEVER_WITHOUT_IT, TAKES_IT_ALONG),
    ),
    Plot(
        "returned",
        "{hero} finds something and gives it back",
        (
            _each("find", "a purse", "a gold watch", "a letter", "a pair of glasses", "a silver coin", "a map"),
            _HELPERS,
            _each("reward", "a sweet roll", "a bag of nuts", "a ripe pear", "a song", "a ride on a pony"),
        ),
        (
            (
                "While {hero} was playing with the {thing}, {he} saw something {spot}. It was {find}.",
                "{hero} put the {thing} down, and there, {spot}, lay {find}.",
            ),
            None,
            (
                '"We could keep it," said {friend}. "No, somebody must be looking for it," said {hero}.',
                '"Whose is it?" asked {friend}. "Let us ask everybody," said {hero}.',
            ),
            ("It belonged to {helper}.", "They asked and asked. At last they learned that it belonged to {helper}."),
            (
                "{Helper} was so glad that {hero} got {reward}.",
                '"Thank you for being honest," said {helper}, and gave {hero} {reward}.',
            ),
            None,
        ),
        (
            ("What did {hero} find?", "{hero} found {find}."),
            ("Where was it?", "It was {spot}."),
            ("Whose was it?", "It belonged to {helper}."),
            ("What did {hero} get?", "{hero} got {reward}."),
        ),
    ),
    Plot(
        "counted",
        "{hero} picks fruit and has {a_thing} with {him}",
        (
            _each("fruit", "apples", "pears", "plums", "lemons", "peaches"),
            tuple(
                {
                    "many": NUMBERS[many - 2],
                    "few": (("one", *NUMBERS))[few - 1],
                    "rest": (("one", *NUMBERS))[many - few - 1],
                }
                for many in range(3, 8)
                for few in range(1, many - 1)
                if many - few > 1
            ),
        ),
        (
            (
                "There {hero} put the {thing} down and picked {many} {fruit}.",
                "There were many trees there. {hero} put the {thing} on the grass and picked {many} {fruit}.",
            ),
            (
                '"I am hungry," said {friend}. So {hero} gave {few} of them to {friend}, and {rest} were left.',
                '"May I have some?" asked {friend}. {hero} gave {fhim} {few}, because {he} had {many}. Now {he} had {rest}.',
            ),
            None,
            (
                '"You share everything," said {friend}.',
                '"Next time I will pick some for you," said {friend}.',
            ),
            None,
        ),
        (
            ("What did {hero} pick?", "{hero} picked {many} {fruit}."),
            ("How many {fruit} did {hero} pick?", "{hero} picked {many} {fruit}."),
            ("How many {fruit} did {friend} get?", "{friend} got {few}."),
            ("How many {fruit} were left?", "There were {rest} left."),
            ("Why did {hero} give {fruit} away?", "{hero} gave {fruit} away because {friend} was hungry."),
        ),
    ),
    Plot(
        "noise",
        "{hero} hears a strange noise and holds {a_thing}",
        (
            _each("noise", "a knock", "a growl", "a whistle", "a rattle", "a squeak", "a splash"),
            _each(
                "source", "a lost lamb", "a little mouse", "an old gate", "a hungry kitten", "a loose window", "an owl"
            ),
            ({"brave": "{hero}", "afraid": "{friend}"}, {"brave": "{friend}", "afraid": "{hero}"}),
        ),
        (
            (
                "Suddenly there was {noise}. {hero} held the {thing} tight.",
                "Then they heard {noise}. It came again and again. {hero} held on to the {thing}.",
            ),
            None,
            (
                '"I am afraid," said {afraid}. "Then I will go and look," said {brave}.',
                '"Let us run away!" said {afraid}. "No, wait here," said {brave}.',
            ),
            (
                "{brave} went closer, step by step. It was only {source}!",
                "{brave} opened both eyes wide and looked. What had made the noise was {source}.",
            ),
            ("They laughed, because there was nothing to fear.", '"That was all!" they said, and they laughed.'),
            None,
        ),
        (
            ("What did they hear?", "They heard {noise}."),
            ("What made the noise?", "It was {source}."),
            ("Who was afraid?", "{afraid} was afraid."),
            ("Who went to look?", "{brave} went to look."),
            ("What did {hero} hold?", "{hero} held the {colour} {thing}."),
        ),
    ),
    Plot(
        "made",
        "{hero} makes {a_thing} for somebody",
        (
            _each("stuff", "wool", "wood", "paper", "clay", "old cloth", "straw"),
            _each(
                "for_whom", "{his} grandmother", "{his} father", "{his} little sister", "{his} uncle", "the new baby"
            ),
            _each("days", "two days", "three days", "one whole week", "one long night"),
        ),
        (
            (
                '"Can you teach me to make {a_new_thing}?" asked {hero}. "Yes, from {stuff}," said {friend}.',
                '{hero} wanted to make {a_new_thing} too. "Take {stuff} for it," said {friend}.',
            ),
            (
                "It took {him} {days}, because {he} had to start again many times.",
                "{hero} worked for {days}. Many times {he} had to start again.",
            ),
            None,
            (
                "The new {thing} {was} for {for_whom}.",
                "When {it} {was} ready, {he} gave the new {thing} to {for_whom}.",
            ),
            ('"Nobody makes better ones," said {friend}.', '"You did that very well," said {friend}.'),
            None,
        ),
        (
            ("Who {was} the new {thing} for?", "The new {thing} {was} for {for_whom}."),
            ("What {was} the new {thing} made from?", "The new {thing} {was} made from {stuff}."),
            ("How long did {hero} work?", "{hero} worked for {days}."),
            ("Who taught {hero}?", "{friend} taught {hero}."),
        ),
    ),
)
