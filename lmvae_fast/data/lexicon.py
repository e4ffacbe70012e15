"""The words of the bundled corpus and what is said of them: groups of nouns, and one table of facts per predicate.

A table's line reads ``nouns : true things ! false things ~ adjuncts``. ``@mammal`` stands for every noun of a group or
topic, ``-whale`` takes one out again. Lists on the right are separated by commas, since a thing may have several words.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Noun:
    """A noun a sentence can be about.

    Attributes:
        singular: the singular, or the only form of a mass noun.
        plural: the plural, or None for a mass noun (iron, rain).
        group: the group it stands in (``mammal``).
        topic: the topic of the group (``animal``).
        modifiers: adjectives that go with it and leave every fact about it true.
    """

    singular: str
    plural: str | None
    group: str
    topic: str
    modifiers: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """A noun and what can be said of it under one predicate."""

    noun: str
    thing: str
    holds: bool
    adjuncts: tuple[str, ...]


# group: topic; modifiers; nouns (singular/plural, or one form for a mass noun)
_GROUPS = """
mammal    : animal   ; young, wild, small, large, healthy ; dog/dogs cat/cats cow/cows horse/horses goat/goats rabbit/rabbits bear/bears wolf/wolves lion/lions mouse/mice bat/bats whale/whales
bird      : animal   ; young, wild, small, large, healthy ; eagle/eagles owl/owls duck/ducks hen/hens penguin/penguins
fish      : animal   ; young, wild, small, large, healthy ; shark/sharks eel/eels
insect    : animal   ; young, wild, small, large, healthy ; bee/bees ant/ants butterfly/butterflies beetle/beetles
reptile   : animal   ; young, wild, small, large, healthy ; snake/snakes lizard/lizards turtle/turtles
amphibian : animal   ; young, wild, small, large, healthy ; frog/frogs toad/toads
tree      : plant    ; young, tall, green, large, healthy ; oak/oaks pine/pines maple/maples
flower    : plant    ; young, tall, wild, small, healthy  ; rose/roses tulip/tulips daisy/daisies
bush      : plant    ; young, small, green, large, healthy ; cactus/cactuses fern/ferns
fruit     : food     ; fresh, small, large, cold          ; apple/apples orange/oranges
vegetable : food     ; fresh, small, large, cold          ; carrot/carrots potato/potatoes
meal      : food     ; fresh, cold, warm                  ; bread milk honey rice cheese
metal     : material ; pure, hot, cold, clean             ; iron copper gold aluminum
solid     : material ; clean, cold, old, new              ; wood glass plastic rubber paper
rock      : material ; hot, cold, clean                   ; granite sand clay
liquid    : material ; pure, warm, cold, clean            ; water oil
tool      : object   ; old, new, small, large, clean      ; hammer/hammers knife/knives spoon/spoons pot/pots nail/nails key/keys wire/wires
container : object   ; old, new, small, large, clean      ; bottle/bottles
clothing  : object   ; old, new, small, large, clean      ; glove/gloves
furniture : object   ; old, new, small, large, clean      ; chair/chairs table/tables window/windows
machine   : object   ; old, new, small, large, clean      ; lamp/lamps heater/heaters oven/ovens radio/radios fan/fans
vehicle   : object   ; old, new, small, large, clean      ; boat/boats car/cars
organ     : body     ; human, small, large, healthy       ; heart/hearts lung/lungs stomach/stomachs brain/brains eye/eyes ear/ears
tissue    : body     ; human, small, large, healthy       ; bone/bones muscle/muscles
air       : weather  ; strong, sudden, cold               ; wind rain snow hail
disaster  : weather  ; strong, sudden, large              ; storm/storms flood/floods drought/droughts earthquake/earthquakes fire/fires
sky       : space    ; distant, large, small, old         ; star/stars planet/planets moon/moons comet/comets
land      : space    ; distant, large, small, old         ; volcano/volcanoes mountain/mountains river/rivers lake/lakes
"""  # noqa: E501

# predicate -> table
_FACTS = {
    # a dog is a kind of mammal
    "kind": """
@mammal : mammal, animal, living thing ! bird, plant, reptile
@bird : bird, animal, living thing ! mammal, plant, insect
@fish : fish, animal, living thing ! mammal, plant, bird
@insect : insect, animal, living thing ! bird, plant, mammal
@reptile : reptile, animal, living thing ! insect, plant, fish
@amphibian : animal, living thing ! insect, plant, bird
@tree : tree, plant, living thing ! flower, animal, food
@flower : flower, plant, living thing ! tree, animal, food
@bush : plant, living thing ! tree, animal, rock
@fruit : fruit, food ! tool, rock, metal
@vegetable : food, living thing ! fruit, rock, metal
@meal : food ! fruit, rock, metal
@metal : metal, material ! liquid, food, living thing
@solid : material, solid ! liquid, metal, food
@rock : rock, material, solid ! liquid, metal, food
@liquid : liquid ! metal, rock, solid
@tool : tool, object ! animal, machine, food
@container : object ! animal, machine, food
@clothing : object ! animal, machine, food
@furniture : object ! animal, machine, food
@machine : machine, object ! plant, tool, food
@vehicle : machine, object ! plant, food
@organ : body part ! tool, animal, food
@tissue : body part ! tool, animal, food
@air : weather, event ! tool, living thing, food
@disaster : event ! tool, living thing, food
@sky : object in space ! living thing, machine, food
@land : place ! living thing, machine, food
""",
    # a bird has wings
    "have": """
@mammal -whale : fur, lungs ! feathers, roots, gills
whale : fins, lungs, bones ! fur, gills, feathers
@bird : feathers, wings, lungs ! fur, roots, fins
@fish : fins, gills, scales ! fur, feathers, wings
@insect -ant : wings, six legs ! fur, bones, lungs
ant : six legs ! fur, bones, feathers
lizard : scales, lungs ! fur, feathers, wings
snake : scales, lungs, bones ! legs, fur, wings
turtle : legs, lungs ! fur, feathers, wings
@amphibian : legs, skin, lungs ! fur, feathers, wings
@tree : roots, leaves, bark ! petals, legs, lungs
@flower : roots, leaves, petals ! bark, legs, lungs
cactus : roots ! leaves, legs, lungs
fern : roots, leaves ! petals, bark, legs
apple orange : seeds, skin ! wings, bones, bark
chair table : legs ! wings, roots, petals
car : doors, windows ! wings, leaves, fins
""",
    # a rabbit eats grass for energy
    "eat": """
wolf lion eagle owl shark : meat, small animals ! grass, leaves, seeds
snake : meat, eggs ! grass, leaves, seeds
dog cat : meat, fish ! leaves, seeds, wood
cow horse goat rabbit : grass, leaves ! meat, insects, fish
bear : fish, honey, fruit ! wood, sand
mouse : seeds, insects, fruit ! wood, bones
duck hen : seeds, insects ! meat, wood, bones
penguin whale : fish, small animals ! grass, leaves, seeds
bat lizard : insects, fruit ! grass, wood, bones
frog toad : insects ! grass, seeds, wood
bee butterfly : nectar ! meat, insects, fish
ant : seeds, leaves, insects ! sand, bones
beetle : leaves, wood ! fish, bones
turtle : leaves, insects ! wood, bones
eel : fish, insects ! grass, leaves, seeds
""",
    # a frog lives in a pond
    "live": """
dog cat : in a house, on a farm ! in the ocean, in a pond, on the ice
cow horse goat hen : on a farm, in a field, in the grassland ! in the ocean, in a cave, in a nest
rabbit : in a field, in the grassland ! in the ocean, in a lake
wolf owl : in the forest ! in the ocean, in a pond
bear bat : in the forest, in a cave ! in the ocean, in a lake
lion snake : in the grassland ! in a lake, on the ice, in a house
mouse : in a house, in a field ! in the ocean, in a lake
whale shark : in the ocean ! in the desert, in the forest, on a farm
eagle : in a nest, in the forest ! in the ocean, in a cave
duck : in a lake, in a pond ! in the desert, in a cave
penguin : on the ice, near the ocean ! in the desert, in the forest
eel : in a river, in a lake ! in the desert, in the forest
bee : in a nest, in a garden ! in the ocean, in a lake
ant beetle : in the soil, in the forest ! in the ocean, on the ice
butterfly : in a garden, in a field ! in the ocean, in a cave
lizard : in the desert, in the forest ! on the ice, in a house
turtle : in a pond, in the ocean ! in a nest, on the ice
frog toad : in a pond, in the forest ! in the ocean, on the ice
""",
    # an oak grows in the forest in spring
    "grow": """
oak pine maple : in the forest, in the soil ! in the ocean, in the desert, in a cave
rose tulip daisy : in a garden, in a field, in the soil ! in the ocean, on the ice, in a cave
cactus : in the desert ! in the ocean, on the ice, in a cave
fern : in the forest, in the soil ! in the desert, on the ice
apple orange : on a tree ! in the ocean, in the desert, in a cave
carrot potato : in the soil, in a garden ! in the ocean, in the desert, on a tree
rice : in a field, in the soil ! in the desert, on the ice, on a tree
""",
    # a plant needs sunlight to grow
    "need": """
@animal : food, water, oxygen ! electricity, fuel ~ to survive, to grow
@plant : water, sunlight, soil ! meat, fuel, electricity ~ to survive, to grow
@fruit @vegetable : water, sunlight ! meat, fuel, electricity ~ to grow
@machine : electricity, energy ! food, water, soil ~ to work
@vehicle : fuel, energy ! food, sunlight, soil ~ to move, to work
@organ @tissue : blood, oxygen ! sunlight, fuel, electricity ~ to work, to grow
fire : oxygen, fuel ! food, soil ~ to burn
""",
    # a cow produces milk
    "produce": """
cow goat : milk ! eggs, honey, nectar
hen duck : eggs ! milk, honey, nectar
bee : honey ! milk, wood
turtle frog toad snake : eggs ! milk, honey
@tree : oxygen, wood, seeds ! milk, eggs, honey
@flower : oxygen, nectar, seeds ! milk, eggs, wood
fern : oxygen ! milk, eggs, wood
lamp : light, heat ! oxygen, water
heater oven : heat ! oxygen, water, milk
radio : sound ! oxygen, water, milk
fan : wind, sound ! oxygen, water, milk
star : light, heat ! water, soil
moon planet comet : gravity ! sunlight, electricity, honey
volcano : heat, smoke ! milk, wood
fire : heat, light, smoke ! water, oxygen
storm : rain, wind ! sunlight, oxygen
stomach : acid ! light, electricity
muscle : heat ! light, oxygen
""",
    # a window is made of glass
    "made": """
hammer : iron, wood ! water, paper, sand
nail key : iron, metal ! wax, paper, water
knife spoon : metal, plastic ! water, paper, sand
pot : iron, clay ! paper, wax, wood
wire : copper, aluminum ! glass, paper, sand
bottle : glass, plastic ! paper, sand, wax
glove : rubber ! glass, sand, water
chair table : wood, plastic ! water, sand, paper
window : glass ! iron, rubber, wax
lamp radio fan : metal, plastic ! water, sand, wax
heater oven : metal ! paper, wood, wax
boat : wood, aluminum ! sand, paper, water
car : metal, glass ! sand, wood, water
paper : wood ! metal, sand, water
glass : sand ! metal, wood, water
@animal @plant @body : cells ! metal, glass, plastic
planet moon mountain volcano : rock ! wood, metal, plastic
star : gas ! wood, ice, plastic
comet : ice, rock ! wood, metal, plastic
river lake rain : water ! oil, metal, plastic
snow hail : ice ! rock, metal, plastic
""",
    # an apple contains sugar
    "contain": """
apple orange : sugar, water, seeds ! salt, bones, metal
carrot potato : sugar, water, minerals ! bones, metal, blood
bread : salt, sugar, air ! bones, metal, blood
milk : fat, water, protein ! seeds, metal, blood
cheese : fat, salt, protein ! seeds, metal, sand
rice : protein, minerals ! blood, metal, bones
honey : sugar, water ! salt, blood, metal
granite : minerals ! sugar, fat, blood
sand clay : minerals, water ! sugar, fat, blood
water : oxygen ! fat, sugar, protein
wood paper : air, water ! salt, metal, blood
@tree @flower @bush : water, sugar, cells ! blood, metal, bones
@mammal @bird @fish : blood, bones, cells ! metal, wood, plastic
heart lung : blood, cells ! salt, seeds, metal
stomach : acid, food ! seeds, metal
brain eye ear : blood, cells ! seeds, sugar, metal
bone : minerals, cells ! seeds, sugar, metal
muscle : protein, blood ! seeds, sand, metal
river lake : water, fish, minerals ! blood, plastic
volcano mountain : minerals, rock ! blood, sugar, plastic
""",
    # a knife is used for cutting bread
    "use": """
hammer : hitting nails, building houses ! cooking food, carrying water
knife : cutting bread, cutting paper ! hitting nails, carrying water
spoon : eating food ! hitting nails, cutting paper
pot : cooking food, boiling water ! cutting bread, hitting nails
nail : building houses, making chairs ! cutting bread, cooking food
key : opening doors, opening windows ! cutting bread, carrying water
wire : carrying electricity ! carrying water, cutting bread
bottle : carrying water, carrying milk ! cutting paper, hitting nails
glove : protecting skin, carrying food ! cooking food, hitting nails
chair : eating food, reading books ! cutting paper, boiling water
table : eating food, reading books ! boiling water, opening doors
lamp : making light, reading books ! carrying water, cooking food
heater : heating air, heating food ! cooling air, cutting bread
oven : cooking food, heating food ! cooling air, cutting paper
radio : hearing sound ! cooking food, boiling water
fan : cooling air, moving air ! heating food, boiling water
boat : crossing rivers, carrying people ! cooking food, cutting bread
car : carrying people ! crossing rivers, boiling water
iron : making nails, building houses ! making paper, heating air
copper : making wires, carrying electricity ! making paper, cooling air
gold aluminum : making wires ! making paper, heating food
wood : making chairs, making paper, building houses ! making wires, carrying electricity
glass : making windows, making bottles ! making wires, hitting nails
plastic : making bottles, making chairs ! making paper, boiling water
rubber : making gloves ! making nails, boiling water
paper : making books, carrying food ! making nails, boiling water
granite : building houses ! making paper, making gloves
sand : making glass ! making paper, making gloves
clay : making pots ! making paper, making wires
water : cooking food, cooling air ! making paper, building houses
oil : cooking food, making plastic ! hitting nails, building houses
horse : carrying people ! crossing rivers, hearing sound
heart : moving blood, moving oxygen ! digesting food, hearing sound
lung : breathing air, moving air ! moving blood, digesting food
stomach : digesting food, carrying food ! moving blood, breathing air
brain : reading books, hearing sound ! digesting food, moving blood
eye : seeing light, reading books ! hearing sound, moving blood
ear : hearing sound ! seeing light, digesting food
bone : protecting lungs, moving legs ! seeing light, digesting food
muscle : moving bones, moving legs ! seeing light, hearing sound
""",
    # rain causes floods in spring
    "cause": """
wind : erosion, damage, waves ! floods, snow
rain : floods, erosion ! droughts, fires, earthquakes
snow : floods, cold weather ! fires, earthquakes
hail : damage ! fires, earthquakes, droughts
storm : floods, damage, waves ! earthquakes, droughts
flood : damage, erosion ! earthquakes, fires, snow
drought : fires, damage, hot weather ! floods, waves, snow
earthquake : damage, waves ! rain, snow, droughts
fire : damage, smoke ! rain, snow, waves
volcano : fires, smoke, damage ! snow, rain, droughts
river : erosion, floods ! fires, earthquakes, snow
moon : waves ! fires, rain, snow
""",
    # a bat can fly
    "can": """
dog wolf lion : run, swim ! fly, read books
horse cow goat : run, swim ! fly, climb trees, read books
cat mouse : run, climb trees, jump ! fly, read books
rabbit : run, jump ! fly, climb trees, read books
bear : run, swim, climb trees ! fly, read books
bat : fly ! swim, read books, conduct electricity
whale shark eel : swim ! fly, run, climb trees
eagle owl : fly ! swim, read books, conduct electricity
duck : fly, swim ! read books, climb trees
hen : run, jump ! swim, read books
penguin : swim, jump ! fly, climb trees
bee butterfly : fly ! swim, read books
ant beetle : climb trees ! swim, read books
snake lizard : swim, climb trees ! fly, read books
turtle : swim ! fly, jump, climb trees
frog toad : swim, jump ! fly, read books
oak pine maple : burn, bend in wind ! run, swim, fly
rose tulip daisy fern : bend in wind ! run, swim, fly
iron copper gold aluminum : conduct electricity, melt, bend ! burn, float on water
wood : burn, float on water ! conduct electricity, melt
paper : burn, bend ! conduct electricity, melt
rubber plastic : bend, melt ! conduct electricity
glass : break, melt ! conduct electricity, burn, bend
granite sand clay : break ! conduct electricity, burn, float on water
water : freeze, boil ! burn, break
oil : burn, float on water ! break, bend
wire : conduct electricity, bend ! burn, float on water
bottle window : break ! conduct electricity, burn
boat : float on water ! fly, run
glove : bend ! conduct electricity, break
nail hammer key knife spoon : conduct heat ! float on water, burn
fire : melt ice, boil water ! float on water, freeze
""",
    # if iron is heated then it will expand
    "if": """
iron copper gold aluminum : is heated = expand, is heated = melt, is cooled = shrink ! is heated = burn, is cooled = melt
wood paper : is heated = burn, is cooled = become cold ! is heated = freeze, is cooled = burn
plastic : is heated = melt, is cooled = become hard ! is cooled = melt
rubber : is heated = expand, is heated = become soft, is cooled = become hard ! is cooled = burn, is dropped = break
glass : is heated = melt, is dropped = break ! is heated = burn, is cooled = melt
granite sand clay : is heated = become hot, is cooled = become cold ! is heated = burn
water milk : is heated = boil, is cooled = freeze ! is heated = freeze, is cooled = boil
oil : is heated = burn, is heated = expand, is cooled = shrink, is cooled = become hard ! is heated = freeze, is cooled = boil
snow hail : is heated = melt, is heated = become water ! is cooled = melt, is heated = freeze
bread rice cheese honey : is heated = become soft, is cooled = become hard ! is heated = freeze
apple orange carrot potato : is heated = become soft, is cooled = become cold ! is cooled = boil, is dropped = fly
bottle window : is dropped = break, is heated = become hot ! is cooled = melt
hammer nail key knife spoon pot : is dropped = fall, is heated = become hot ! is dropped = break, is cooled = melt
@animal : gets no food = die, gets no food = become weak, gets food = grow ! gets no water = survive, gets no food = grow
@plant : gets no water = die, gets no water = become dry, gets sunlight = grow ! gets no sunlight = grow, gets no water = survive
@machine : gets no electricity = stop, gets electricity = work ! gets no electricity = work
@vehicle : gets no fuel = stop, gets fuel = move ! gets no fuel = move
@organ @tissue : gets no blood = become weak, gets no blood = stop ! gets no blood = work, gets no oxygen = survive
fire : gets no oxygen = stop, gets oxygen = grow ! gets no oxygen = burn, gets no fuel = grow
""",  # noqa: E501
    # melting is when ice changes into a liquid
    "define": """
iron copper gold aluminum plastic glass snow : melting ~ by adding heat
water milk oil honey : freezing ~ by losing heat
water milk oil : boiling ~ by adding heat
water rain : evaporation ~ by adding heat
wolf lion eagle owl shark snake cat bear : hunting ~ at night, for energy
duck eagle whale butterfly : migration ~ in winter, in spring
bee butterfly bat beetle : pollination ~ in spring, in summer
@animal : digestion, breathing, growth
@plant : growth, photosynthesis
bear bat frog toad snake turtle mouse : hibernation ~ in winter
wind rain flood river : erosion
bread rice carrot potato : cooking
paper glass plastic aluminum : recycling
wood paper oil : burning
car boat horse : transport
""",
    # gold is found in rivers
    "found": """
iron copper aluminum : in rocks, in the ground ! in the sky, in a nest
gold : in rocks, in rivers ! in the sky, in a nest
wood : in the forest, in a house ! in the sky, in space
glass plastic rubber paper : in a house ! in the sky, in a nest, in space
granite : in mountains, in the ground ! in the sky, in a nest
sand : in the desert, near the ocean ! in the sky, in a nest
clay : in the soil, in the ground ! in the sky, in a nest
water : in rivers, in the ocean, in the ground ! in a wire, in rocks
oil : in the ground ! in the sky, in a nest, in space
hammer nail key wire : in a house, on a farm ! in the sky, in the ocean, in a nest
knife spoon pot bottle : in a house, in a kitchen ! in the sky, in the ocean, in a nest
table chair window lamp radio fan heater : in a house ! in the sky, in the ocean, in a nest
oven : in a kitchen ! in the sky, in the ocean, in a nest
glove : in a house, in a garden ! in the sky, in the ocean
bread milk cheese honey rice : in a kitchen, in a house ! in the sky, in space, in rocks
heart lung : in the chest, in the body ! in the head, in rocks
stomach muscle bone : in the body ! in the sky, in rocks
brain eye ear : in the head, in the body ! in the chest, in rocks
star planet comet moon : in space, in the sky ! in the ocean, in the ground
volcano mountain : near the ocean, on land ! in the sky, in a house
river lake : on land, in the forest ! in the sky, in a house
""",
}


def _nouns() -> dict[str, Noun]:
    nouns = {}
    for line in _GROUPS.strip().splitlines():
        group, rest = line.split(":")
        topic, modifiers, members = rest.split(";")
        for member in members.split():
            singular, _, plural = member.partition("/")
            adjectives = tuple(word.strip() for word in modifiers.split(","))
            nouns[singular] = Noun(singular, plural or None, group.strip(), topic.strip(), adjectives)
    return nouns


def _listed(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _facts(table: str, nouns: dict[str, Noun]) -> tuple[Fact, ...]:
    facts = []
    for line in table.strip().splitlines():
        subjects, _, claims = line.partition(":")
        claims, _, adjuncts = claims.partition("~")
        true, _, false = claims.partition("!")
        chosen: list[str] = []
        for word in subjects.split():
            if word.startswith("@"):
                chosen += [noun.singular for noun in nouns.values() if word[1:] in (noun.group, noun.topic)]
            elif word.startswith("-"):
                chosen.remove(word[1:])
            else:
                chosen.append(nouns[word].singular)
        for noun in chosen:
            for holds, things in ((True, true), (False, false)):
                facts += [Fact(noun, thing, holds, tuple(_listed(adjuncts))) for thing in _listed(things)]
    return tuple(facts)


#: Every noun by its singular.
NOUNS: dict[str, Noun] = _nouns()

#: Every predicate's facts, in a fixed order.
FACTS: dict[str, tuple[Fact, ...]] = {predicate: _facts(table, NOUNS) for predicate, table in _FACTS.items()}
