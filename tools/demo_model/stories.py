"""Generator of short stories in simple English.

Every story is drawn from a hand-written grammar: a plot is a list of steps, a
step is a list of alternative sentences, and a sentence may hold nested choices
``[a|b|c]`` and slots ``{name}`` that are filled from the cast and the props
chosen for that story. A slot written with a capital first letter is the same
slot, capitalised. The whole text of a training run is a function of its seed.

    python stories.py --seed 1 --count 5
"""

import argparse
import random
import re

GIRLS = """Lily Anna Mia Sara Emma Lucy Rosa Ella Nora Zoe Clara Ivy Maya Ruby Alice
Hanna Eva Tina Molly Amy Sofia Nina Lena Kate Julia Bella Daisy Grace Holly June Mary
Poppy Wendy Olga Fatima Leila Yuki Priya Carmen Ada""".split()
BOYS = """Tom Ben Max Sam Jack Leo Tim Oscar Peter Noah Finn Adam Paul Omar Hugo Luke
Oliver Theo Daniel Mark Nick Emil Ivan Ravi Kenji Carlos Felix Harry Jonas Karl Milo
Arthur Simon Victor Will Eric Hans Ali Dan George""".split()
PETS = """Rusty Coco Pip Bruno Nutmeg Biscuit Pepper Waffle Misty Luna Teddy Ginger
Pebble Bubbles Hazel Toffee Socks Willow Sunny Clover Cinder Moss Button Fern Maple
Barley Cookie Olive Ziggy Snowy Dusty Berry Acorn Honey Muffin Plum Tilly Bramble
Otto Fudge""".split()

KIDS_ADJ = "little kind young clever brave curious happy shy quiet cheerful".split()
ANIMALS = """fox rabbit bear mouse cat dog duck frog hedgehog squirrel turtle owl deer pig
lamb goat pony kitten puppy beaver badger hen penguin elephant monkey lion""".split()
ANIMAL_ADJ = """little small young brave gentle curious clever fluffy shy happy brown gray
lazy hungry friendly cheerful""".split()

ADULTS = [
    ("{his} mother", "she"), ("{his} father", "he"), ("{his} grandmother", "she"),
    ("{his} grandfather", "he"), ("{his} aunt", "she"), ("{his} uncle", "he"),
]
HELPERS = [
    ("the old farmer", "an old farmer", "he"), ("the baker", "a round and jolly baker", "he"),
    ("the wise owl", "a wise owl", "she"), ("the gardener", "a kind gardener", "she"),
    ("the old turtle", "a very old turtle", "he"), ("the fisherman", "a quiet fisherman", "he"),
    ("the old woman", "an old woman with a walking stick", "she"),
    ("the gray goose", "a gray goose", "she"), ("the shepherd", "a young shepherd", "he"),
    ("the miller", "a tall miller with white hands", "he"),
    ("the postwoman", "a cheerful postwoman", "she"), ("the crow", "a clever black crow", "he"),
    ("the queen", "a queen in a long blue coat", "she"), ("the deer", "a gentle deer", "she"),
]
COLORS = "red blue green yellow white purple orange golden silver brown pink".split()
TOYS = """ball hat kite scarf drum boat bell book button mitten basket cup flute ribbon
umbrella lamp key doll blanket whistle ring shell feather bag""".split()
FOODS = """apple_pie honey_cake loaf_of_bread berry_tart pot_of_soup bowl_of_nuts
basket_of_cherries plum_cake cheese_pie plate_of_cookies basket_of_pears jar_of_honey
pancake pumpkin_pie""".split()
HOMES = """in a small house near the river|in a little village by the sea|on a green hill
|at the edge of a big forest|in a tiny cottage under an old oak tree|on a farm far away
|in a busy town with many bridges|beside a quiet lake|in a valley between two mountains
|in a warm house with a red door|near a wide field of flowers|on a small island
|at the end of a long road|behind the old mill""".replace("\n", "").split("|")
PLACES = [
    ("in", "the forest"), ("in", "the park"), ("in", "the garden"), ("on", "the beach"),
    ("by", "the river"), ("in", "the meadow"), ("near", "the old bridge"), ("by", "the lake"),
    ("on", "the hill"), ("at", "the market"), ("in", "the field"), ("near", "the mill"),
]
HIDING = """under the bed|behind the door|in the tall grass|under a bush|on top of the shelf
|behind a big rock|inside an old boot|under a pile of leaves|next to the well|between two stones
|in the hollow of a tree|under the bench|behind the barn|at the bottom of the basket
|beside the gate""".replace("\n", "").split("|")
WEATHER = [
    ("sunny", ["The sun was warm and the sky was blue.", "The sun was shining and the birds were singing.",
               "There was not a single cloud in the sky.", "Bees were humming in the flowers."]),
    ("windy", ["The wind was blowing and the trees were dancing.", "The wind pushed the clouds across the sky.",
               "Leaves were flying everywhere in the wind."]),
    ("rainy", ["The rain was falling softly on the roof.", "Gray clouds hung low and it rained and rained.",
               "There were big puddles on every path."]),
    ("cold", ["The air was cold and the grass was white with frost.", "Everyone could see their breath in the cold air.",
              "There was a thin layer of ice on the pond."]),
    ("foggy", ["A soft white fog lay over the fields.", "The fog was so thick that the trees looked like ghosts."]),
    ("bright", ["The morning light was golden.", "The air smelled of grass and flowers.",
                "Small white clouds moved slowly across the sky."]),
    ("snowy", ["Big soft flakes of snow were falling.", "The whole world was white and quiet."]),
    ("warm", ["A warm wind came from the south.", "The air was warm and smelled of hay.",
              "Butterflies were flying over the path."]),
]


def pron(p, pre):
    t = {"he": ("he", "him", "his", "himself"), "she": ("she", "her", "her", "herself")}[p]
    return {pre + k: v for k, v in zip(("he", "him", "his", "self"), t)}


def person(r, pre, used, kind=None):
    """A child, a named animal or a nameless animal; returns slots with prefix `pre`."""
    kind = kind or r.choice(["child", "child", "child", "pet", "pet", "beast"])
    p = r.choice(["he", "she"])
    while True:
        if kind == "child":
            name = r.choice(GIRLS if p == "she" else BOYS)
            noun = "girl" if p == "she" else "boy"
            adj = r.choice(KIDS_ADJ)
            refs = [name] * 8
        else:
            noun = r.choice(ANIMALS)
            adj = r.choice(ANIMAL_ADJ)
            name = r.choice(PETS) if kind == "pet" else "the " + noun
            refs = [name] * 5 + ["the " + noun] if kind == "pet" else ["the " + noun] * 3 + [f"the {adj} {noun}"]
        if name not in used and noun not in used:
            break
    used.add(name)
    if kind != "child":
        used.add(noun)
    d = pron(p, pre)
    named = r.choice(["named", "named", "called"])
    d.update({
        pre: lambda: r.choice(refs),
        pre + "n": "little " + noun if kind == "beast" else name,      # how others address them
        pre + "noun": noun, pre + "adj": adj, pre + "kind": kind,
        pre + "intro": f"a {adj} {noun}" + ("" if kind == "beast" else f" {named} {name}"),
        pre + "plain": f"a {adj} {noun}",
    })
    return d


def make_cast(r):
    used = set()
    c = person(r, "h", used)
    animal_world = c["hkind"] != "child"
    c.update(person(r, "f", used, r.choice(["pet", "beast", "pet"]) if animal_world or r.random() < .3 else "child"))
    # hero slots get short pronoun names
    for k in ("he", "him", "his", "self"):
        c[k] = c["h" + k]
    # the friend is introduced at the first mention, whatever sentence that is in
    seen = c["seen"] = set()
    ref, intro = c["f"], c["fintro"]

    def friend():
        if "f" in seen:
            return ref()
        seen.add("f")
        if c["fkind"] == "child":
            return f"{c['his']} [best |good |]friend {c['fn']}"
        if c["fkind"] == "pet":
            return f"{c['his']} friend {c['fn']} the {c['fnoun']}"
        return f"{c['his']} [friend|neighbor] the {c['fnoun']}"

    def friend_intro():
        seen.add("f")
        return intro

    c["f"], c["fintro"] = friend, friend_intro
    adult, ap = r.choice(ADULTS)
    c["a"] = adult.replace("{his}", c["his"])
    c["amum"] = adult.split()[1].capitalize()                      # address: "Mother"
    c.update(pron(ap, "a"))
    gs = [g for g in HELPERS if not any(g[0].endswith(u.split()[-1]) for u in used)]
    g, gi, gp = r.choice(gs)
    c["g"], c["gintro"] = g, gi
    c.update(pron(gp, "g"))
    col = r.choice(COLORS)
    toy = r.choice(TOYS)
    c["o"], c["col"], c["co"] = toy, col, f"{col} {toy}"
    toy2 = r.choice([t for t in TOYS if t != toy])
    c["o2"] = toy2
    c["co2"] = f"{r.choice([x for x in COLORS if x != col])} {toy2}"
    food = r.choice(FOODS).replace("_", " ")
    c["food"] = food
    c["home"] = r.choice(HOMES)
    prep, place = r.choice(PLACES)
    c["place"], c["inplace"] = place, f"{prep} {place}"
    prep2, place2 = r.choice([x for x in PLACES if x[1] != place])
    c["place2"], c["inplace2"] = place2, f"{prep2} {place2}"
    c["hidp"] = r.choice(["behind the door", "in the tall grass", "under a bush", "behind a big rock", "next to the well",
                          "behind the barn", "under an old tree", "beside the gate", "by the wall", "on a fallen tree"])
    c["hid"], c["hid2"], c["hid3"] = r.sample(HIDING, 3)
    w, ws = r.choice(WEATHER)
    c["w"] = w
    c["wsent"] = r.choice(ws)
    c["num"] = r.choice(["two", "three", "four", "five", "six", "seven"])
    return c


CHOICE = re.compile(r"\[([^\[\]]*)\]")
SLOT = re.compile(r"\{(\w+)\}")


def expand(t, c, r):
    while True:
        m = CHOICE.search(t)
        if not m:
            break
        t = t[:m.start()] + r.choice(m.group(1).split("|")) + t[m.end():]

    def fill(m):
        k = m.group(1)
        low = k.lower()
        v = c[low]
        if callable(v):
            v = CHOICE.sub(lambda n: r.choice(n.group(1).split("|")), v())
        return v[0].upper() + v[1:] if k != low else v

    t = SLOT.sub(fill, t)
    t = re.sub(r"\b([Aa]) (?=[aeiouAEIOU])(?!one\b|uni|use)", r"\1n ", t)
    return re.sub(r"  +", " ", t)


OPEN_ONCE = [
    "Once upon a time, there was {hintro}. {H} lived {home}.",
    "Once upon a time there was {hintro} who lived {home}.",
    "Once upon a time, {home}, there lived {hintro}.",
    "Once upon a time, there lived {hintro}. {He} lived {home} with {a}.",
    "Once upon a time there lived {hintro} {home}. {Wdesc}",
    "Once upon a time, {hintro} lived {home}. {Likes}",
    "Once upon a time, there was {hintro}. {Likes}",
]
OPEN_OTHER = [
    "One {w} [morning|day|afternoon], {hintro} went for a walk {inplace}. {Wsent}",
    "Long ago, {home}, there lived {hintro}. {Likes}",
    "There was once {hintro} who lived {home}.",
    "It was a {w} [morning|day]. {Wsent} {Hintro} was playing {inplace}.",
    "{Hintro} lived {home}. {Likes}",
    "In a land far away, there was {hintro}. {He} lived {home}.",
    "One day, {hintro} woke up very early. {Wsent}",
]
LIKES = [
    "{H} liked to [play|walk|sing|read|run|dream] {inplace} [every day|in the morning|when the sun was out|after lunch].",
    "{H} loved [the rain|stories|music|flowers|the stars|long walks|sweet apples|the smell of bread] more than anything.",
    "Every [morning|evening], {h} said hello to [the birds|the sun|the trees|{a}|all the neighbors].",
    "{He} was not very [big|strong|fast|tall], but {he} had a [good|kind|warm|brave] heart.",
    "Everyone [there|around] knew {h} because {he} was always [smiling|singing|helping|asking questions].",
]
WDESC = [
    "There was a small garden with a big tree.", "It was a quiet and happy place.",
    "The days were long and full of games.", "Everyone there was friendly.",
]
DAY = ["One {w} [morning|day|afternoon], ", "One day, ", "Early one morning, ", "One [evening|afternoon], ",
       "On a {w} day, "]
MORALS = [
    "From that day on, {h} {lesson}.", "{H} never forgot that day.", "{H} had learned that {truth}.",
    "And {h} knew that {truth}.", '"{Truth}," said {a}. {H} [nodded|smiled|thought so too].',
    "After that, {h} {lesson}.", "That is how {h} learned that {truth}.", "",
]
ENDINGS = [
    "That night, {h} [slept very well|fell asleep with a smile|dreamed of {place}|slept like a stone].",
    "And they all lived happily ever after.", "They were happy for the rest of the day.",
    "It was the best day of {his} life.", "Then {he} went home, tired but [happy|proud|very happy].",
    "And [they were|they stayed] good friends for a long, long time.",
    "When the stars came out, everyone was [safe|happy|asleep] at home.",
    "{H} went to bed [happy|warm and happy|with a full belly and a happy heart].", "The end.",
    "And if you walk {inplace} today, you may still hear them [laughing|singing].",
]


# Each plot: dict(truth, lesson, steps). A step is a list of alternatives ("" = left out).
PLOTS = []


def plot(truths, lessons, *steps):
    PLOTS.append((truths, lessons, steps))


# 1 a lost thing
plot(["good things come back when friends help", "it is easier to look for things together", "two pairs of eyes are better than one"],
     ["took good care of {his} things", "put the {o} in its place every night"],
     ["{H} had a {co} that {he} loved very much. [It was a gift from {a}.|{He} took it everywhere.|{A} had made it for {him}.]",
      "The thing {h} loved most was a {co}. [{He} never went out without it.|It had once belonged to {a}.]"],
     ["{day}the {o} was gone. {H} looked {hid} and {hid2}, but it was not there.",
      "{day}{h} could not find the {o}. {He} looked {hid}, but there was [nothing|only dust|only an old shoe].",
      "{day}{h} reached for the {co}, but it was not there. [{He} felt very sad.|{He} began to cry.]"],
     ['"Where is my {o}?" [cried|asked] {h}. "I had it yesterday!"', '"Oh no! I have lost my {o}," said {h} [sadly|in a small voice|with tears in {his} eyes].', ""],
     ['{F} heard {him} and came to [help|see what was wrong]. "Don\'t worry, {hn}," said {f}. "We will look for it together."',
      '{F} came by. "What is wrong?" asked {f}. "My {co} is lost," said {h}. "Then I will help you," said {f}.'],
     ["They looked {inplace} and they looked {inplace2}. They asked {g}, but {ghe} had not seen it.",
      "First they went to {place}. Then they went to {place2}. There was no {o} anywhere.",
      'They asked {g}. "I saw something {col} {hid3}," said {g}.'],
     ['At last, {f} looked {hid3}. "Here it is!" {fhe} [shouted|called]. It was the {co}!',
      "Then {h} saw something {col} {hid3}. It was the {o}!",
      "Just when they wanted to give up, {f} saw something {col} {hid3}. {H} ran to look. It was the {co}!"],
     ['"Thank you, {fn}!" said {h}, and {he} [hugged {fhim}|jumped for joy|laughed and laughed].',
      '{H} was so happy that {he} [danced|hugged {f}|sang a song]. "You are a true friend," {he} said.'],
     )
# 2 found something, give it back
plot(["being honest feels better than having many things", "it is good to give back what is not ours", "honest hearts find good friends"],
     ["told the truth, even when it was hard", "helped people who had lost something"],
     ["{day}{h} was walking {inplace} when {he} saw something {col} {hid}. It was a {co}!",
      "{day}{h} found a {co} {hid}. [It was very pretty.|It was shining in the light.|There was no one around.]"],
     ["{He} picked it up and looked at it. [It was the prettiest {o} {he} had ever seen.|\"I wish it were mine,\" {he} thought.]",
      '"What a beautiful {o}!" said {h}. {He} wanted to keep it.'],
     ["But then {he} thought, \"Someone must be [sad|looking for it|missing it].\"",
      "But {a} had always told {him} to be honest. \"I must find the owner,\" said {h}."],
     ['{He} went to {place2} and asked {g}. "Is this your {o}?" asked {h}. "No," said {g}, "but I heard someone crying {inplace}."',
      "{He} asked {g}, but {ghe} shook {ghis} head. {He} asked everyone {inplace2}, but the {o} was not theirs."],
     ["Then {h} saw {fintro} who was sitting {inplace2} and crying.", "At last {he} met {fintro} who looked very sad."],
     ['"Why are you [sad|crying]?" asked {h}. "I have lost my {co}," said {f}. "My mother gave it to me."',
      '"I lost my {o}," said {f}. "It was {col}, and I loved it so much."'],
     ['"Is this it?" asked {h}, and {he} held out the {o}. {F} [jumped up|smiled at once|could not believe it]. "Yes! Thank you!"',
      '{H} gave the {co} to {f}. "You found it!" said {f}, and {fhe} began to smile.'],
     ["{F} was so happy that {fhe} gave {h} a {food}, and they ate it together.", "From then on, {h} and {f} played together every day.",
      '"Do you want to play with me?" asked {f}. They played {inplace2} until the sun went down.'],
     )
# 3 a fear
plot(["being brave does not mean having no fear", "things are less scary when you look at them closely", "a friend makes the dark a little brighter"],
     ["was not so afraid anymore", "remembered to take a deep breath when {he} was afraid"],
     ["But {h} had a secret. {He} was afraid of {fear}.", "There was only one thing that {h} did not like. {He} was afraid of {fear}."],
     ["When {he} saw a picture of it, {he} [closed {his} eyes|ran to {a}|began to shake].",
      "Whenever {he} thought of {fear}, {his} [heart beat fast|legs began to shake|hands grew cold]."],
     ['{day}{f} came to visit. "Come with me," said {f}. "I cannot," said {h}. "I am afraid of {fear}."',
      '{day}{h} told {f} about it. "Please do not laugh," said {h}. {F} did not laugh at all.'],
     ['"I was afraid too when I was small," said {f}. "{A} helped me."'.replace("{A}", "My mother"),
      '"Everyone is afraid of something," said {f}. "I am afraid of [bees|geese|deep holes|big spiders]."',
      '"Hold my hand," said {f}. "We will go together."'],
     ["So they went out together, step by step. {H} held {f} tightly.", "Together they counted to {num}. Then {h} opened {his} eyes.",
      "{H} took a deep breath. {He} took one small step, and then another."],
     ["And do you know what? It was not so bad. {Fearfact}", "Slowly, {h} stopped shaking. {Fearfact}"],
     ['"I did it!" said {h}. "{Yes}," said {f}. "You are very brave."', '{H} [laughed|smiled]. "I am not afraid anymore," {he} said.'],
     )
# 4 sharing food
plot(["food tastes better when you share it", "sharing makes everyone happy", "half a cake with a friend is better than a whole one alone"],
     ["shared {his} food with others", "kept a little piece for {f}"],
     ["{day}{a} made a {food}. It smelled wonderful. \"This is for you, {hn},\" said {a}.",
      "{day}{h} bought a {food} at the market. {He} could not wait to eat it.",
      "{day}{h} found a {food} on the table. [It was still warm.|It was just for {him}.]"],
     ["{H} took it and sat down {inplace}. {He} wanted to eat it all by {self}.", "{He} carried it carefully to {place}. \"I will eat all of it,\" {he} thought."],
     ["Then {fintro} came along. {F} looked at the {foodn} and [said nothing|licked {fhis} lips|sighed].",
      "Just then {f} came by. {F} looked tired and hungry."],
     ['"Are you hungry?" asked {h}. "Yes," said {f}. "I have not eaten [all day|since yesterday|anything today]."',
      '"That smells good," said {f}. "I have no food at home."'],
     ["{H} looked at the {foodn}. It was not very big. {He} thought for a [moment|long time].",
      "{H} wanted to keep it, but {f} looked so sad.", "At first {h} turned away. But then {he} felt bad."],
     ['"Here," said {h}, "let us share it." {He} [gave half of it to {f}|put it between them|let {f} choose first].',
      'Then {he} smiled and said, "There is enough for both of us."'],
     ["They ate together and [talked about {place2}|laughed about funny things|watched the clouds|told each other stories]. {Wsent2}",
      "It was the best {foodn} {h} had ever eaten."],
     ["The next day, {f} came back with a {co}. \"This is for you, because you were kind to me,\" {fhe} said.",
      "The next day, {f} brought {num} ripe apples and shared them with {h}.", ""],
     )
# 5 building
plot(["you can always try again", "strong things are built slowly", "many hands make hard work easy"],
     ["built things slowly and well", "asked {his} friends for help"],
     ["{day}{h} wanted to build a {thing}. [{He} had seen one {inplace}.|{He} had dreamed of it all night.]",
      '"I want to build a {thing}," said {h}. "It will be the best {thing} in the world."'],
     ["{He} took some {mat} and began to work. {He} worked very fast.", "{He} gathered {mat} and put them together in a hurry.",
      "All day long, {he} worked with {mat}. {He} did not stop to rest."],
     ["But in the night a strong wind came and the {thing} fell down.", "But when {he} was finished, the {thing} shook and broke into pieces.",
      "Then a big storm came, and in the morning the {thing} was broken."],
     ["{H} sat down and [cried|put {his} head in {his} hands|looked at the pieces]. \"I will never build a {thing},\" {he} said.",
      "{H} was [angry|very sad]. {He} kicked {a_stone}."],
     ['{F} came and looked at it. "You used {mat}," said {f}. "We need {mat2}. I know where we can find some."',
      '{Gintro} came by. "Do not give up," said {g}. "Take {mat2} this time, and work slowly."'],
     ["So {h} and {f} went to {place2} and found {mat2}. They carried them home piece by piece.",
      "The next morning, {h} and {f} began again. {F} held the pieces and {h} put them together."],
     ["They worked for {num} days. This time, they were careful.", "They did not hurry. They [sang|talked|laughed] while they worked."],
     ["When the wind came again, the {thing} did not fall. It was strong.", "At last the {thing} was ready. It was [strong and beautiful|even better than the first one]."],
     ['"We did it!" [cried|said] {h}. {F} [clapped|smiled and nodded|did a little dance].', ""],
     )
# 6 planting
plot(["good things take time", "you must wait for the best things", "even a tiny seed can become something great"],
     ["was patient", "planted a new seed every spring"],
     ["{day}{g} gave {h} a tiny seed. \"Plant it and be patient,\" said {g}.", "{day}{h} found a small seed {hid}. \"What will it be?\" {he} asked.",
      "{day}{a} gave {h} a little brown seed. \"Take good care of it,\" said {a}."],
     ["{H} made a hole in the ground, put the seed in, and covered it with [soft earth|dark soil]. Then {he} gave it some water.",
      "{He} planted it in {a_pot} near the window and gave it a little water."],
     ["The next day, {h} ran to look, but there was nothing. The day after that, there was still nothing.",
      "Every morning {h} looked at the ground. One day passed, and then {num} days passed. Nothing happened."],
     ['"It will never grow," said {h}. "Wait," said {a}. "It is sleeping under the ground."',
      '{F} laughed. "There is nothing there," said {f}. But {h} kept giving it water every day.',
      '"Why does it not grow?" asked {h}. "You have to be patient," said {f}.'],
     ["When it was dry, {h} brought water. When it was cold, {he} covered the ground with [leaves|straw|{his} own scarf].",
      "{H} sang to the seed and told it stories. [{F} helped {him}.|Sometimes {f} came and sang too.]"],
     ["Then, after a warm rain, a tiny green leaf came out of the ground!", "And one morning, there was something small and green. It was growing!"],
     ["It grew and grew. [In summer|Soon] it was a big {plant}.", "Day by day it became taller, and in the end it was a beautiful {plant}."],
     ["{H} showed it to {f}. \"You were right to wait,\" said {f}.", "Everyone came to see it. {A} was very proud of {him}.",
      "{H} gave {plantgift} to {f}, because good things are for sharing."],
     )
# 7 baby bird
plot(["even someone small can be a great help", "kindness is never wasted", "every little one needs a home"],
     ["looked up at the nest and waved", "listened for small voices"],
     ["{day}{h} heard a small sound {inplace}. \"[Peep|Cheep|Tweet]! [Peep|Cheep|Tweet]!\" It came from {hid}.",
      "{day}{h} was walking {inplace} when {he} heard someone crying {hidp}."],
     ["{He} looked, and there was a baby bird on the ground. It had fallen out of its nest.",
      "It was a tiny bird. It was cold and could not fly."],
     ['"Do not be afraid," said {h} softly. "I will help you."', '"Poor little bird," said {h}. "Where is your mother?" The bird only shook its wings.'],
     ["{H} looked up and saw the nest. It was high in a tree, and {he} could not reach it.",
      "The nest was very high, and {h} was too small to reach it."],
     ["{He} tried to climb, but {he} slid down. {He} tried to jump, but it was too high.",
      "{He} put the bird in {his} [hat|scarf|basket] to keep it warm and went to find help."],
     ['Then {f} came by. "Stand on my back," said {f}. "Together we are tall enough."',
      '{He} ran to {f}. "I need your help," {he} said. {F} came at once with a long ladder.',
      '{Gintro} was near. "I have a ladder," said {g}, and {ghe} brought it.'],
     ["Very slowly and carefully, {h} put the little bird back in the nest.", "{H} climbed up, step by step, and put the bird into its soft nest."],
     ["The mother bird came back and sang a [happy|sweet|long] song for them.",
      'The mother bird came flying. "You saved my child," she said. "Thank you, {hn}!"'],
     ["Every morning after that, the birds sang at the window of {h}.", "In the summer, the little bird flew down to visit {h}.", ""],
     )
# 8 a race
plot(["it is not important to be the fastest", "slow and steady can win", "a good friend is better than a prize"],
     ["stopped to help others, even in a race", "ran just for fun"],
     ["{day}there was a big race {inplace}. The prize was a {co}. Everyone wanted to win.",
      '{day}{g} told everyone about a race from {place} to {place2}. The winner would get a {co}.'],
     ['"I am the fastest," said {f}. "I will win." {H} said nothing, but {he} wanted to try.',
      '{F} laughed at {h}. "You are too slow," said {f}. "I will win for sure."'],
     ['"One, two, three, go!" [shouted|called] {g}, and everyone began to run.', "{G} rang a bell, and the race began."],
     ["{F} ran very fast and was soon far ahead. {H} ran slowly, but {he} did not stop.",
      "Soon {f} was in front and {h} was the last of all. But {h} did not give up."],
     ["Then {f} [fell over a root|fell into a muddy hole|slipped on a wet stone] and hurt {fhis} leg.",
      "After a while, {f} became tired and lay down {hidp}. Soon {fhe} was asleep."],
     ["{H} saw {f} and stopped. \"Come, get up,\" said {h}. \"We can finish together.\"",
      "{H} could have passed by, but {he} stopped. \"Are you all right?\" {he} asked. \"Lean on me.\""],
     ["{F} was surprised. \"Why do you help me?\" {fhe} asked. \"Because you are my friend,\" said {h}.",
      '"But you will not win now," said {f}. "That is all right," said {h}.'],
     ["They crossed the line together, side by side. Everyone [cheered|clapped].", "They came to the end at the same time, and everyone was happy for them."],
     ["{G} gave the {o} to both of them, and they shared it.", '"I am sorry I was proud," said {f}. "You are the real winner."'],
     )
# 9 a present
plot(["the best gifts come from the heart", "a gift does not need to cost money", "love is the best present of all"],
     ["made all {his} presents with {his} own hands", "remembered the birthdays of {his} friends"],
     ["{day}it was almost the birthday of {f}. {H} wanted to give {fhim} something [nice|special|beautiful].",
      '"Tomorrow is my birthday," said {f}. {H} wanted to find a good present.'],
     ["But {h} had no money. {He} looked {hid} and found only {num} buttons.", "{H} went to the market, but everything cost too much.",
      "{H} thought and thought, but {he} had no idea."],
     ['{He} asked {a}. "Give something that you can make," said {a}.', '"What does {f} like?" asked {a}. "{FHe} likes {likes2}," said {h}.',
      "So {he} walked to {place2} to think."],
     ["Then {h} had an idea. {He} took {mat} and began to make a {co}.", 'Suddenly {h} smiled. "I will make a {co}!" {he} said.'],
     ["It was hard work. {His} hands were tired, but {he} did not stop until it was [dark|ready].",
      "{He} worked all evening. {A} helped {him} a little."],
     ["The next day, {h} went to the party. Everyone had brought big presents. {H} felt shy.",
      "On the birthday, {h} put the {o} in a box and carried it to {f}."],
     ["{F} opened the box and [smiled|could not speak for a moment|gave a shout of joy]. \"A {co}! Did you make it for me?\"",
      '"It is only a small thing," said {h}. {F} looked at the {co} and {fhis} eyes shone.'],
     ['"It is the best present of all," said {f}.', '"I will keep it forever," said {f}, and {fhe} hugged {h}.'],
     ["Then they all ate a {food} and [sang songs|danced|played games] until evening.", ""],
     )
# 10 rainy day play
plot(["a gray day can be a good day", "you can have fun in any weather", "every day has something good in it"],
     ["liked rainy days too", "looked for puddles after the rain"],
     ["{day}it was raining. {H} wanted to go to {place}, but {a} said, \"It is too wet outside.\"",
      "{day}{h} looked out of the window. It was raining, and all the games were outside."],
     ['"What a boring day," said {h}. {He} sat down [by the window|on the floor|at the table|on the stairs] and sighed.', "{H} was [bored|sad]. {He} watched the drops run down the glass."],
     ["Then there was a knock at the door. It was {f}, and {fhe} was all wet.", "Then {f} came running through the rain with a {co}."],
     ['"Let us make a boat out of paper," said {f}.', '"Let us build a tent with blankets," said {f}.', '"Put on your boots," said {f}. "The puddles are as big as lakes!"'],
     ["They [played that they were sailors|pretended to be pirates|played that the room was a ship] and that the {co} was [a treasure|the captain's|magic].",
      "They jumped into every puddle and splashed each other. Soon both of them were wet and laughing."],
     ["{A} laughed when {ahe} saw them and gave them [hot milk|warm soup|hot tea] and a {food}.", "When they were cold, they sat by the fire and ate a {food}."],
     ["At last the rain stopped, and there was a rainbow over {place}.", "Then the sun came out, and the whole world was shining."],
     ['"Look, a rainbow!" said {f}. "I hope it rains again tomorrow," said {h}.', '"It was a good day after all," said {h}.'],
     )
# 11 soup
plot(["a meal is best with many friends", "everyone has something to give", "a little from each makes enough for all"],
     ["cooked for all {his} friends once a week", "put one more plate on the table"],
     ["{day}{h} wanted to make soup. {He} had a big pot and some water, but {he} had only one {veg}.",
      '{day}{h} was hungry. In the kitchen there was nothing but one old {veg}. "I will make soup," {he} said.'],
     ["{He} made a fire and put the {veg} in the pot. {He} tasted it. It tasted like [water|nothing|warm rain].",
      '{He} put the {veg} into the hot water. "It needs something more," {he} said.'],
     ['Then {f} came by. "What are you making?" {fhe} asked. "Soup," said {h}, "but I have only a {veg}."',
      '{F} smelled the fire and came in. "May I help?" asked {f}.'],
     ['"I have {veg2}," said {f}, and {fhe} put them in the pot.', "{F} ran home and came back with {veg2}. They put them in the soup."],
     ['Then {g} came with a little salt. "Here, try this," said {g}.', "{G} came too and brought {veg3}.",
      "Soon {g} knocked at the door and gave them {veg3}."],
     ["They stirred and stirred. The soup began to smell very good.", "{H} stirred the pot and {f} [sang|watched the fire|set the table]."],
     ["When it was ready, there was enough for everyone. They ate until the pot was empty.", "They all sat around the table and ate. It was the best soup in the world."],
     ['"This morning I had only one {veg}," said {h}, "and now I have a feast."', '"We must do this again," said {f}.', ""],
     )
# 12 a journey
plot(["the road is as beautiful as its end", "you have to go and see for yourself", "home is sweet after a long trip"],
     ["told everyone about {his} journey", "dreamed of the next journey"],
     ["{H} had never seen {goal}. {day}{he} said, \"I will go and see it.\"", '{day}{h} asked, "What does {goal} look like?" "You must go and see," said {a}.'],
     ["{He} packed a {food} and a {co} and [said goodbye to {a}|left at sunrise|went out of the door].",
      "{A} gave {him} a {food} and a {co} for the journey."],
     ["On the way {he} met {fintro}. \"Where are you going?\" asked {f}. \"To see {goal},\" said {h}. \"May I come too?\" asked {f}.",
      '{F} was sitting {inplace}. "I want to see {goal} too," said {f}. So they went together.'],
     ["They walked through {place2} and over {num} hills. Their feet [hurt|were sore|grew tired].", "They walked for {num} days. They slept under the stars."],
     ["Then they came to a wide river. There was no bridge. {H} did not know what to do.", "Then they lost their way, and {h} wanted to turn back."],
     ['"Use the {co}," said {f}. That was a good idea, and soon they were on the right way again.',
      'They met {gintro}. "Follow me," said {g}. "I know the way." And {ghe} showed them the path.'],
     ["At last they came to the top of a hill, and there it was. {Goal} was [bigger|more beautiful|brighter] than {h} had ever dreamed.",
      'At last {f} shouted, "Look!" And there was {goal}. {H} could not say a word.'],
     ["They sat there together until evening and ate the {foodn}.", "They stayed for a long time and watched. Then they went home, singing all the way."],
     ["When {h} came home, {a} hugged {him} and asked to hear everything.", ""],
     )
# 13 a lie and a broken thing
plot(["it is best to tell the truth", "a mistake is not so bad if you are honest", "the truth makes your heart light"],
     ["told the truth", "was careful in the house"],
     ["{day}{h} was playing with a {co} in the house. {A} had told {him} not to do that.", "{day}{h} and {f} were running around in the house."],
     ["Suddenly there was a loud crash. The {vase} fell on the floor and broke.", "{He} bumped into the table, and the {vase} broke into {num} pieces."],
     ["{H} was afraid. {He} hid the pieces {hid}.", "{H} quickly put the pieces {hid} and hoped that no one would see."],
     ['{A} came home and asked, "Where is the {vase}?" "I do not know," said {h}. "Maybe the wind took it."',
      '"Who broke the {vase}?" asked {a}. {H} looked at the floor. "It was not me," {he} said.'],
     ["All day {h} felt bad. {He} could not eat and {he} could not play.", "That night {h} could not sleep. {His} heart felt as heavy as a stone."],
     ['"What should I do?" {he} asked {f}. "Tell the truth," said {f}. "You will feel better."', '"You look sad," said {f}. "I told a lie," said {h}. "Then you must make it right," said {f}.'],
     ["So {h} went to {a} and said, \"I broke the {vase}. I am sorry that I lied.\"", 'In the end, {h} took the pieces and brought them to {a}. "I did it," {he} said. "I am so sorry."'],
     ["{A} was quiet for a moment. Then {ahe} hugged {him}. \"Thank you for telling me the truth,\" {ahe} said.",
      '"I was sad about the {vase}," said {a}, "but I am glad that you told me the truth."'],
     ["Together they [glued the pieces|mended the {vase}|made a new {vase}].", "{H} felt as light as a feather.", ""],
     )
# 14 a new neighbor
plot(["a new friend may be closer than you think", "shy hearts need a little time", "one kind word can change a whole day"],
     ["said hello to everyone new", "had a friend right next door"],
     ["{day}someone new came to live next door. It was {fintro}.", "{day}{h} saw {fintro} who had just moved [there|into the house next door]."],
     ["{F} stood alone {inplace} and did not say a word. {FHe} was very shy.", "No one played with {f}. {FHe} sat {hidp} and watched the others."],
     ['"Hello," said {h}. "My name is {hself2}. What is your name?" But {f} only looked at {fhis} feet.',
      "{H} waved, but {f} ran away and hid {hidp}."],
     ['{H} asked {a}, "Why does {f} not talk to me?" "{FHe} is shy," said {a}. "Give {fhim} some time."',
      "{H} was sad. {He} thought that {f} did not like {him}."],
     ["The next day, {h} brought a {food} and put it at the door of {f}.", "The next day, {h} left a {co} at the door with a little note."],
     ["The day after that, {f} came out and smiled a little. \"[Thank you|That was very kind],\" {fhe} said in a quiet voice.",
      "Then {f} came to the fence. In {fhis} hands {fhe} held a {co2}. \"This is for you,\" {fhe} said."],
     ['"Do you want to play {inplace}?" asked {h}. {F} nodded.', '"Shall we go to {place2}?" asked {h}. "{Yes}, please," said {f}.'],
     ["They played [all day|until it was dark], and {f} was not shy anymore.", "{F} knew {num} funny songs, and {h} laughed all afternoon."],
     )
# 15 a wish
plot(["a wish for someone else is the best wish", "a kind heart is worth more than gold", "giving makes you rich"],
     ["wished good things for others", "kept the {o} close to {his} heart"],
     ["{day}{h} found a {co} {hid}. When {he} touched it, it began to [shine|glow|sing].",
      "{day}{h} helped {gintro} carry a heavy bag. \"Take this {co},\" said {g}. \"It is magic.\""],
     ['"I am a magic {o}," it said. "You may make one wish."', 'A small voice came out of the {o}. "You have one wish," it said. "Choose well."'],
     ['"I could wish for {rich}," thought {h}. "Or I could wish for {rich2}."', "{H} thought about {rich}. {He} thought about {rich2}. It was hard to choose."],
     ["Then {he} saw {f}, who was [sick|sad|cold and hungry|all alone]. {F} sat {inplace} and did not smile.",
      "On the way home, {he} met {fintro}. {F} was [very sick|crying|very sad]."],
     ['"What is wrong?" asked {h}. "{Trouble}," said {f}.', '{H} asked why. "{Trouble}," said {f}, and a tear fell on the ground.'],
     ["{H} did not think for long. {He} held the {co} in {his} hands and said, \"I wish that {f2} would be happy again.\"",
      '{H} closed {his} eyes. "I wish that my friend would be happy," {he} said to the {o}.'],
     ["There was a bright light. The {o} was [quiet|not magic anymore], but {f} [began to smile|jumped up and laughed].",
      "The {co} shone like a star, and then it was dark. When {h} looked up, {f} was smiling."],
     ['"You gave me your only wish," said {f}. "Why?" "Because you are my friend," said {h}.', '"Now I have no wish left," said {h}, "but I have a happy friend."'],
     )
# 16 lost in the woods
plot(["you should stay calm when you are lost", "there is always a light somewhere", "a small light can show a long way"],
     ["stayed close to the path", "looked at the stars before going to bed"],
     ['"Do not go too far," said {a}. But {day2}{h} followed a [butterfly|rabbit|bird|sound] deep into the forest.',
      "{day}{h} and {f} went into the forest to look for [berries|mushrooms|flowers]. They walked farther and farther."],
     ["When {he} looked around, all the trees looked the same. {He} was lost.", "Then it grew dark, and the path was gone."],
     ['"[Hello|Help]!" called {h}. "Is anyone there?" But only the wind answered.', "{H} was cold and afraid. {He} sat down {hidp} and [cried|waited]."],
     ["Then {he} remembered what {a} had told {him}. \"If you are lost, [follow the river|look for the bright star|stay calm and listen].\"",
      "Suddenly there was a rustle. Out came {gintro}. \"Why are you here so late?\" asked {g}."],
     ['"I want to go home," said {h}. "I live {home}."', "{H} wiped {his} tears and stood up. {He} was going to be brave."],
     ["So {he} walked along the river, step by step, and sang to {self} so as not to be afraid.", "{He} looked up and saw a bright star. {He} walked and walked toward it.",
      "Far away, {he} saw a small yellow light between the trees. {He} ran toward it."],
     ["At last {he} saw a lamp. It was {a}, who was looking for {him}!", "And there was the house, and {a} was standing at the door."],
     ['"There you are!" cried {a}, and {ahe} held {him} tight. "I was so worried."', "{A} wrapped {him} in a warm blanket and gave {him} a {food}."],
     ['"I will never go so far again," said {h}.', '"I am sorry," said {h}. "{Yes}, I know," said {a}, and {ahe} smiled.', ""],
     )
# 17 a sick friend
plot(["a visit can be the best medicine", "a smile can help more than you think", "love makes us well"],
     ["visited {his} friends when they were sick", "kept some tea for {f}"],
     ["{day}{f} did not come out to play. {H} waited {inplace}, but {fhe} did not come.", "{day}{h} heard that {f} was sick and had to stay in bed."],
     ['{H} went to the house of {f} and knocked. "I am sick," said a weak voice. "I cannot play today."',
      '"Poor {f}," said {h} to {a}. "What can I do?" "Bring {fhim} something nice," said {a}.'],
     ["{H} ran to {place2} and picked {num} flowers.", "{H} took a {food} and put it in a basket.", "{H} looked for {his} {co}, because it always made {f} laugh."],
     ["On the way, {he} met {g}. \"Take this [honey|warm tea|soup] too,\" said {g}. \"It is good for sick [friends|people].\"",
      "It began to rain on the way, but {h} did not turn back."],
     ["{F} was lying in bed and looked very [pale|tired]. But when {fhe} saw {h}, {fhe} smiled.", "{H} came in quietly and sat down by the bed."],
     ["{H} told {fhim} a story about {place}, and {f} laughed for the first time that day.", "{H} sang a song and {f} listened. Soon {fhe} felt a little better.",
      "They played a quiet game and drank tea together."],
     ['"Will you come again tomorrow?" asked {f}. "I will come every day," said {h}.', "{H} came back every day until {f} was well."],
     ["After {num} days, {f} could play outside again. They ran to {place} together.", "Soon {f} was strong and well, and {fhe} jumped around like before."],
     )
# 18 learning
plot(["you learn by trying again and again", "nobody can do everything on the first day", "it is all right to fall"],
     ["tried again when something was hard", "helped others to learn"],
     ["{H} wanted to learn how to {skill}. All the others could do it.", "{day}{h} saw {f}, who knew how to {skill}. \"I want to do that too,\" said {h}."],
     ["{He} tried, but {skillfail}.", "The first time {he} tried to {skill}, {skillfail}."],
     ["Some of the others laughed. {H} felt [small|sad|ashamed].", '"I cannot do it," said {h}. "I will never be able to {skill}."'],
     ['"No one can do it the first time," said {f}. "I tried {num} times. Try again!"', '"Do you want me to show you?" asked {f}. "{Yes}, please," said {h}.',
      '{A} said, "Every day a little. That is how you learn."'],
     ["So every day after breakfast, {h} went to {place} to practice.", "They went to {place} every day. {F} showed {him} how to do it."],
     ["On the second day, {he} was a little better. On the third day, {he} was better still.", "{He} fell many times, but {he} always got up again."],
     ["Then, one {w} morning, it worked! {H} could {skill}!", 'And one day, {h} shouted, "Look at me!" {He} could really {skill}.'],
     ["{F} [clapped|cheered|jumped for joy]. \"I knew you could do it!\" {fhe} said.", "Everyone cheered, and {a} was very proud."],
     )
# 19 a strange noise
plot(["strange things are often not so bad", "it is good to look before you are afraid", "sometimes a monster is only a hungry friend"],
     ["smiled when {he} heard a noise at night", "left a bowl of milk at the door"],
     ["{day2n}{h} heard a strange noise. \"[Scratch, scratch|Bump, bump|Creak, creak]!\" It came from {hid}.",
      '{day2n}{h} was in bed when there was a noise. "What was that?" {he} whispered.'],
     ['"Maybe it is a monster," thought {h}, and {he} pulled the blanket over {his} head.', "{His} heart beat fast. {He} thought of monsters with big teeth."],
     ["The next night, the noise came again. {H} called {f}. \"Please stay with me,\" {he} said.", '{H} told {f} about it. "Let us find out what it is," said {f}.'],
     ["They took a lamp and a {co} and went on tiptoe through the dark.", "{F} held a lamp, and {h} held a {co}. Slowly they went closer."],
     ["The noise grew louder. Something moved {hid}. {H} wanted to run away.", '"There it is!" whispered {f}. Two green eyes were looking at them.'],
     ["But it was not a monster. It was only a tiny {tiny}! It was [cold and hungry|lost|afraid too].", "Then they saw it. It was a little {tiny}, and it was shaking with fear."],
     ['"You poor thing," said {h}. "We were afraid of you, and you were afraid of us."', "{H} began to laugh. \"So you are the monster!\" {he} said."],
     ["They gave it some [milk|bread|seeds|warm soup], and it fell asleep in a box near the fire.", "{H} made a soft bed for it out of an old scarf."],
     ["{A} said it could stay. They named it {tinyname}.", "In the morning, they named it {tinyname}, and it stayed with {h}.", ""],
     )
# 20 stuck in a tree
plot(["together we can reach high places", "there is always another way", "a good idea is stronger than strong arms"],
     ["asked for help when {he} needed it", "held the {stuck} with both hands"],
     ["{day}{h} was playing with a {col} {stuck} {inplace}. A strong wind came and carried it away.", "{day}{h} was running {inplace} with {his} new {col} {stuck}. It flew higher and higher."],
     ["It flew into a tall tree and stayed there. {H} could not reach it.", "Then it was stuck at the top of an old tree."],
     ["{He} jumped, but {he} was too small. {He} threw {a_stone}, but it fell back down.", "{He} shook the tree as hard as {he} could, but the {stuck} did not move."],
     ['{F} came by. "I can help," said {f}, but {fhe} could not reach it either.', '{F} saw it and tried to climb the tree, but the branches were too high.'],
     ['"If I stand on your back," said {h}, "I can reach the first branch."', 'Then {g} came by. "Why do you not work together?" asked {g}.'],
     ["So {f} stood on {g}, and {h} stood on {f}. They were like a tower!", "{H} stood on {f} and reached up with a long stick."],
     ["{H} reached out, a little more, just a little more, and then {he} had it!", "The {stuck} moved, and then it fell slowly down into the grass."],
     ['"Hooray!" they all [shouted|cried]. The {col} {stuck} was safe.', '"We did it together!" said {h}, and {he} held the {stuck} tight.'],
     ["Then {h} let {f} play with the {stuck} too.", "They took turns with the {stuck} until evening.", ""],
     )
# 21 a sad musician / lonely place
plot(["music can make friends", "even a quiet voice can be heard", "every song finds its ear"],
     ["sang every evening", "played music for everyone"],
     ["{H} loved to play the {music}, but {he} only played when no one was there.", "{H} could play the {music} better than anyone, but nobody knew it."],
     ["{day}there was going to be a feast {inplace}, but the musician was sick. Everyone was [sad|worried].", "{day}{g} was very sad, because there was no music for the feast {inplace}."],
     ['"Who can play for us?" asked {g}. No one said a word.', '"A feast without music is not a feast," said {g}.'],
     ['{F} looked at {h}. "You can do it," {fhe} said softly.', '"{H} can play the {music}!" said {f}. Everyone turned and looked at {him}.'],
     ['"But I am too shy," said {h}. "Then look only at me," said {f}.', "{H} became red. {He} wanted to hide {hidp}."],
     ["{H} took the {music} and closed {his} eyes. The first note was [quiet|very soft], but then the music grew.", "{He} began to play, and {his} hands were shaking. But slowly {he} forgot the people around {him}."],
     ["Soon everyone was dancing. Even {g} danced.", "It was like [rain and sunshine|a river|birds in spring]. When it was over, everyone clapped."],
     ['"Please play another one!" they cried. And {h} played until the moon came up.', '"That was beautiful," said {g}. {H} smiled and bowed.'],
     )
# 22 winter snowman
plot(["things that melt can still be loved", "a friend may come again next year", "nothing good is ever really lost"],
     ["waited for the first snow", "kept the {o} in a safe place until winter"],
     ["{day3}snow fell all night. In the morning, {h} ran outside. Everything was white!", "{day3}{h} woke up and saw that the world was white."],
     ['"Let us build a snowman," said {f}. They rolled {num} big balls of snow.', "{H} called {f}, and they began to build a snowman."],
     ["They gave it a carrot nose, two dark stones for eyes, and a {co}.", "{F} found a carrot for the nose, and {h} gave it {his} own {co}."],
     ['"Good morning," said the snowman. {H} could not believe it. The snowman could talk!', "When they were finished, the snowman [opened its eyes|smiled at them|said hello]!"],
     ["All winter long, {h} and {f} played with the snowman. It told them stories about [the north|the stars|ice and wind].", "They played every day. The snowman was very good at [telling stories|throwing snowballs|making jokes]."],
     ["But then the sun grew warm, and the snowman became smaller and smaller.", "But spring was near. The snowman began to melt."],
     ['"Please do not go," said {h}. "I must," said the snowman, "but I will come back with the snow."', '"Do not be sad," said the snowman. "I will see you next winter."'],
     ["One morning there was only a {co} in the grass. {H} picked it up.", "In the end, there was only water, a carrot, and the {co}."],
     ["{H} kept the {o} all summer. And when the first snow fell, {he} ran outside and began to build.", "The next winter, they built it again, and it said, \"Hello, my friends!\""],
     )

FEARS = [
    ("the dark", "The dark was soft and quiet, and there were many stars."),
    ("thunder", "It was only a big noise far away in the clouds."),
    ("deep water", "The water was cool and it held {him} up."),
    ("the big dog next door", "The dog only wanted to play and it licked {his} hand."),
    ("high places", "From up there, {he} could see the whole valley."),
    ("the old empty house", "Inside there was only dust and a family of mice."),
]
THINGS = "house boat bridge tower tree_house raft wall shed windmill bench cart".split()
MATS = ["thin sticks", "dry leaves", "old boxes", "straw", "paper", "sand"]
MATS2 = ["strong wood", "big stones", "long ropes", "thick branches", "good boards", "flat stones"]
PLANTS = [("apple tree", "the first red apple"), ("sunflower", "a handful of seeds"), ("rose bush", "the first red rose"),
          ("pumpkin", "half of it"), ("cherry tree", "a basket of cherries"), ("bean plant", "a bowl of beans"),
          ("pear tree", "the sweetest pear")]
VEG = ["carrot", "potato", "onion", "cabbage", "turnip", "bean"]
VEGS = ["two potatoes", "some peas", "three carrots", "some mushrooms", "some beans", "four tomatoes"]
VEGS3 = ["some fresh herbs", "a piece of cheese", "a loaf of bread", "a little butter"]
GOALS = ["the sea", "the high mountain", "the great waterfall", "the big city", "the lighthouse", "the end of the river",
         "the castle", "the field of a thousand flowers"]
VASES = ["vase", "blue plate", "lamp", "big bowl", "mirror", "teapot", "clock", "flower pot"]
RICH = ["a room full of gold", "a hundred cakes", "a fast horse", "a big castle", "wings", "a crown", "a ship with white sails", "a mountain of candy"]
TROUBLE = ["I have no home", "I miss my mother", "My house burned down", "I have lost my way", "Nobody plays with me", "I have not eaten for days"]
SKILLS = [("swim", "{he} swallowed a lot of water"), ("ride a bicycle", "{he} fell into a bush"), ("skate on the ice", "{he} fell on {his} nose"),
          ("climb trees", "{he} slid down again"), ("whistle", "there was only air and no sound"), ("bake bread", "the bread was as hard as a stone"),
          ("dance", "{he} fell over {his} own feet"), ("paint", "there was only a big gray spot on the paper"), ("row a boat", "the boat only went around in a circle"),
          ("juggle", "all the balls fell on {his} head")]
TINY = ["kitten", "mouse", "hedgehog", "puppy", "bat", "squirrel", "duckling"]
STUCK = ["kite", "balloon", "paper plane", "hat", "scarf"]
MUSIC = ["flute", "violin", "drum", "guitar", "harp", "trumpet"]


def make_props(c, r):
    c["fear"], c["fearfact"] = r.choice(FEARS)
    c["thing"] = r.choice(THINGS).replace("_", " ")
    c["mat"], c["mat2"] = r.choice(MATS), r.choice(MATS2)
    c["plant"], c["plantgift"] = r.choice(PLANTS)
    c["veg"] = r.choice(VEG)
    c["veg2"] = r.choice([v for v in VEGS if c["veg"][:4] not in v])
    c["veg3"] = r.choice(VEGS3)
    c["goal"] = r.choice(GOALS)
    c["vase"] = r.choice(VASES)
    c["rich"], c["rich2"] = r.sample(RICH, 2)
    c["trouble"] = r.choice(TROUBLE)
    c["skill"], c["skillfail"] = r.choice(SKILLS)
    c["tiny"] = r.choice([t for t in TINY if t not in (c["hnoun"], c["fnoun"])])
    c["tinyname"] = r.choice([p for p in PETS if p not in (c["hn"], c["fn"])])
    c["stuck"] = r.choice(STUCK)
    c["music"] = r.choice(MUSIC)
    c["likes2"] = r.choice(["flowers", "bright colors", "warm things", "funny things", "music", "shiny things"])
    c["foodn"] = c["food"].split(" of ")[-1] if " of " in c["food"] else c["food"].split()[-1]
    if c["foodn"] in ("nuts", "cherries", "cookies", "pears"):   # keep the verbs singular
        c["foodn"] = "food"
    c["a_stone"] = r.choice(["a stone", "a small stone", "a stick"])
    c["a_pot"] = r.choice(["a pot", "a blue pot", "an old cup", "a small box"])
    c["yes"] = r.choice(["yes", "oh yes", "of course"])
    c["f2"] = c["f"]
    c["hself2"] = c["hn"] if c["hkind"] != "beast" else c["hadj"].capitalize() + " " + c["hnoun"].capitalize()
    _, ws = r.choice([x for x in WEATHER if x[0] in ("sunny", "bright", "warm", "windy")])
    c["wsent2"] = r.choice(ws)


ASIDES = [
    "A bird sang in a tree nearby.", "Far away, a bell rang {num} times.", "It was very quiet.", "{Wsent2}",
    "A little cloud passed in front of the sun.", "{H} was [a little tired|hungry by now|very curious].",
    "A leaf fell from a tree.", "Somewhere a dog was barking.", "The church clock struck {num}.", "{H} scratched {his} head.",
    "Time passed slowly.", "{H} took a deep breath.", "An old cart rolled by.", "There was a smell of [bread|smoke|rain|hay] in the air.",
]


def story(r):
    """One story as plain text; `r` is a random.Random."""
    c = make_cast(r)
    make_props(c, r)
    truths, lessons, steps = r.choice(PLOTS)
    if "raining" in steps[0][0]:
        c["w"], c["wsent"] = r.choice([("rainy", "Gray clouds hung low over the hills."), ("gray", "The sky was dark."),
                                       ("wet", "Big drops fell from every roof.")])
    once = r.random() < 0.62
    c["likes"] = expand(r.choice(LIKES), c, r)
    c["wdesc"] = r.choice(WDESC)
    for k in ("fearfact", "skillfail"):
        c[k] = expand(c[k], c, r)
    opening = r.choice(OPEN_ONCE if once else OPEN_OTHER)
    if not once and r.random() < 0.3:
        opening = opening.replace("One day, {hintro} woke", "One {w} morning, {hintro} woke")
    started = re.match(r"One|It was", opening) is not None      # the day has already been named
    c["day"] = r.choice(["Soon ", "After a while, ", "A little later, ", "On that day, "]) if started else expand(r.choice(DAY), c, r)
    c["day2"] = r.choice(["one day ", "that day ", "one afternoon "])
    c["day2n"] = r.choice(["One night, ", "One dark night, ", "Late one evening, ", "In the middle of the night, "])
    c["day3"] = r.choice(["One winter, ", "One cold night, ", "In December, ", "One day in winter, "])
    parts = [expand(opening, c, r)]
    for i, alts in enumerate(steps):
        t = r.choice(alts)
        if not t:
            continue
        if i and r.random() < 0.07:
            parts.append(expand(r.choice(ASIDES), c, r))
        s = expand(t, c, r)
        parts.append(s[0].upper() + s[1:])
    moral = r.choice(MORALS)
    if moral:
        c["truth"] = expand(r.choice(truths), c, r)
        c["lesson"] = expand(r.choice(lessons), c, r)
        parts.append(expand(moral, c, r))
    if not moral or r.random() < 0.8:
        ends = ENDINGS if "f" in c["seen"] else [e for e in ENDINGS if "they" not in e.lower().split()]
        parts.append(expand(r.choice(ends), c, r))
    return " ".join(x.strip() for x in parts)


def stories(seed, count):
    r = random.Random(seed)
    for _ in range(count):
        yield story(r)


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--count", type=int, default=5)
    args = ap.parse_args()
    for s in stories(args.seed, args.count):
        print(s, end="\n\n")
