"""Word lists and facts that scripts/make_tasks.py builds the offline task suite from; written for this project."""

# country: capital, by region, so that wrong answers come from the neighbourhood
CAPITALS = (
    # Western Europe
    """France: Paris; Spain: Madrid; Portugal: Lisbon; Italy: Rome; Germany: Berlin; Austria: Vienna;
    Switzerland: Bern; Belgium: Brussels; Ireland: Dublin; England: London; Scotland: Edinburgh; Wales:
    Cardiff; Greece: Athens; Malta: Valletta; the Netherlands: Amsterdam""",
    # North and East Europe
    """Denmark: Copenhagen; Sweden: Stockholm; Norway: Oslo; Finland: Helsinki; Iceland: Reykjavik; Poland:
    Warsaw; Hungary: Budapest; Romania: Bucharest; Bulgaria: Sofia; Russia: Moscow; Ukraine: Kyiv; Belarus:
    Minsk; Lithuania: Vilnius; Latvia: Riga; Estonia: Tallinn; Serbia: Belgrade; Croatia: Zagreb; Slovenia:
    Ljubljana; Slovakia: Bratislava; the Czech Republic: Prague; Albania: Tirana; Moldova: Chisinau; Bosnia:
    Sarajevo; Montenegro: Podgorica; North Macedonia: Skopje; Kosovo: Pristina""",
    # Asia
    """China: Beijing; Japan: Tokyo; South Korea: Seoul; North Korea: Pyongyang; Mongolia: Ulaanbaatar; Vietnam:
    Hanoi; Thailand: Bangkok; Laos: Vientiane; the Philippines: Manila; Indonesia: Jakarta; Nepal: Kathmandu;
    Bhutan: Thimphu; Bangladesh: Dhaka; Pakistan: Islamabad; Afghanistan: Kabul; Uzbekistan: Tashkent;
    Kyrgyzstan: Bishkek; Tajikistan: Dushanbe; Turkmenistan: Ashgabat; Azerbaijan: Baku; Armenia: Yerevan;
    Georgia: Tbilisi; Taiwan: Taipei; the Maldives: Malé""",
    # Middle East
    """Turkey: Ankara; Iran: Tehran; Iraq: Baghdad; Syria: Damascus; Lebanon: Beirut; Jordan: Amman; Saudi
    Arabia: Riyadh; Qatar: Doha; Bahrain: Manama; Oman: Muscat; Yemen: Sanaa; Cyprus: Nicosia""",
    # Africa
    """Egypt: Cairo; Libya: Tripoli; Tunisia: Tunis; Algeria: Algiers; Morocco: Rabat; Sudan: Khartoum; Kenya:
    Nairobi; Uganda: Kampala; Rwanda: Kigali; Somalia: Mogadishu; Ghana: Accra; Nigeria: Abuja; Senegal:
    Dakar; Mali: Bamako; Niger: Niamey; Zambia: Lusaka; Zimbabwe: Harare; Mozambique: Maputo; Angola: Luanda;
    Namibia: Windhoek; Botswana: Gaborone; Madagascar: Antananarivo; Cameroon: Yaoundé; Liberia: Monrovia;
    Ethiopia: Addis Ababa; Malawi: Lilongwe; Sierra Leone: Freetown; Togo: Lomé; Guinea: Conakry; Gabon:
    Libreville; Eritrea: Asmara; Mauritania: Nouakchott; Burkina Faso: Ouagadougou; Lesotho: Maseru; the
    Gambia: Banjul; Mauritius: Port Louis""",
    # Americas
    """Canada: Ottawa; Mexico: Mexico City; Cuba: Havana; Jamaica: Kingston; Haiti: Port-au-Prince; Honduras:
    Tegucigalpa; Nicaragua: Managua; Costa Rica: San José; Colombia: Bogotá; Venezuela: Caracas; Ecuador:
    Quito; Peru: Lima; Chile: Santiago; Argentina: Buenos Aires; Uruguay: Montevideo; Paraguay: Asunción;
    Guyana: Georgetown; Suriname: Paramaribo; Barbados: Bridgetown; the Bahamas: Nassau; Belize: Belmopan""",
)

OPPOSITES = """hot cold; big small; up down; fast slow; light dark; rich poor; young old; happy sad; early
    late; hard soft; open closed; full empty; wet dry; high low; strong weak; long short; thick thin; wide
    narrow; deep shallow; loud quiet; clean dirty; sharp blunt; smooth rough; heavy lightweight; near far;
    left right; front back; inside outside; top bottom; first last; begin end; win lose; buy sell; push
    pull; give take; love hate; laugh cry; arrive depart; remember forget; accept reject; attack defend;
    build destroy; increase decrease; expand contract; import export; include exclude; lend borrow; teach
    learn; lead follow; float sink; rise fall; appear vanish; allow forbid; praise blame; reward punish;
    succeed fail; create demolish; tighten loosen; freeze melt; whisper shout; gather scatter; hide reveal;
    save spend; awake asleep; alive dead; true false; right wrong; safe dangerous; cheap expensive; easy
    difficult; simple complex; polite rude; brave cowardly; generous stingy; honest dishonest; humble proud;
    lazy diligent; calm anxious; kind cruel; patient impatient; careful careless; visible invisible;
    possible impossible; legal illegal; fair unfair; guilty innocent; public private; major minor; maximum
    minimum; positive negative; plural singular; ancient modern; artificial natural; temporary permanent;
    urban rural; domestic foreign; physical mental; abstract concrete; active passive; flexible rigid; fresh
    stale; ripe unripe; raw cooked; sweet bitter; tame wild; tight loose; vertical horizontal; straight
    crooked; single married; male female; north south; east west; summer winter; day night; sunrise sunset;
    dawn dusk; heaven hell; war peace; friend enemy; victory defeat; profit loss; question answer; supply
    demand; entrance exit; ceiling floor; ancestor descendant; host guest; master servant; predator prey;
    student teacher; husband wife; arrival departure; beauty ugliness; wisdom foolishness; courage fear;
    hope despair; truth lie; wealth poverty; strength weakness; success failure; beginning ending; birth
    death; joy sorrow; order chaos; freedom slavery; knowledge ignorance; optimist pessimist; hero villain;
    amateur professional; majority minority; ally opponent; cause effect; debit credit; always never; often
    seldom; more less; many few; before after; above below; over under; together apart; present absent;
    forward backward; inhale exhale; ascend descend; encourage discourage; agree disagree; connect
    disconnect; lock unlock; pack unpack; obey disobey; trust distrust; appreciate despise; multiply divide;
    add subtract; send receive; sit stand"""

# members of kinds, in families of kinds that could be taken for each other
CATEGORIES = [
    {
        "bird": "sparrow eagle robin pigeon owl swan crow heron falcon finch parrot woodpecker",
        "fish": "salmon trout tuna cod herring carp mackerel halibut perch sardine haddock sturgeon",
        "insect": "beetle moth wasp ant mosquito cricket grasshopper dragonfly ladybug termite cockroach butterfly",
        "mammal": "otter badger rabbit squirrel giraffe camel hedgehog weasel buffalo moose beaver kangaroo",
        "reptile": "lizard crocodile tortoise iguana cobra gecko alligator viper chameleon python turtle rattlesnake",
    },
    {
        "tree": "oak birch maple willow pine elm cedar beech spruce poplar sycamore hemlock",
        "flower": "rose tulip daisy lily orchid violet daffodil marigold carnation peony chrysanthemum geranium",
        "fruit": "apple pear banana peach plum cherry mango apricot raspberry grape papaya nectarine",
        "vegetable": "carrot cabbage spinach turnip broccoli radish lettuce celery cauliflower parsnip leek",
    },
    {
        "tool": "hammer screwdriver wrench chisel saw pliers drill shovel rake axe spanner mallet",
        "musical instrument": "violin flute trumpet cello piano clarinet harp guitar trombone oboe banjo saxophone",
        "furniture": "chair table sofa wardrobe bookcase desk bench cupboard armchair stool dresser cabinet",
        "vehicle": "truck bicycle tractor bus motorcycle van ambulance taxi tram scooter limousine minivan",
        "garment": "jacket shirt skirt sweater coat blouse scarf vest trousers dress cardigan overcoat",
        "metal": "iron copper tin zinc nickel aluminium lead titanium cobalt tungsten chromium magnesium",
    },
    {
        "sport": "tennis football hockey rowing bowling golf volleyball wrestling archery fencing rugby badminton",
        "profession": """doctor carpenter lawyer baker plumber tailor butcher nurse electrician engineer blacksmith
        dentist""",
        "dance": "waltz tango polka foxtrot rumba samba flamenco mambo minuet quickstep salsa jive",
        "disease": """measles malaria cholera diabetes influenza pneumonia tuberculosis asthma smallpox mumps
        leprosy typhoid""",
    },
]

# subjects and attractors of the agreement sentences
THINGS = """key cabinet painting letter machine picture bottle window ladder engine basket statue report
    poster carpet blanket lantern mirror candle curtain package pencil shelf helmet camera telescope
    suitcase bucket magnet notebook umbrella bridge tower tunnel garden fountain boat wagon kettle drawer
    pillow saddle anchor violin compass"""
PEOPLE = """author teacher pilot farmer senator lawyer doctor sailor banker driver painter singer soldier
    student manager dancer tailor barber editor surgeon gardener hunter inspector juggler knight librarian
    mechanic neighbour officer poet referee sculptor tourist umpire visitor witness"""
ADJECTIVES = """old tall young famous clever quiet tired busy careful strange polite angry lonely cheerful
    wealthy nervous brave modest hungry lucky honest gentle curious patient serious friendly grumpy stubborn"""
# third person singular and plural of verbs that fit people and things alike
VERBS = (("is", "are"), ("was", "were"), ("has", "have"), ("seems", "seem"), ("looks", "look"), ("appears", "appear"))

RELATIVE_VERBS = "liked painted found admired noticed mentioned remembered described watched praised"

MEN = """king uncle grandfather prince father brother nephew waiter actor monk boy husband duke emperor
    wizard grandson groom stepfather policeman fisherman"""
WOMEN = """queen aunt grandmother princess mother sister niece waitress actress nun girl wife duchess
    empress witch granddaughter bride stepmother policewoman landlady"""
REFLEXIVE_VERBS = """blamed introduced defended hurt surprised taught described praised dressed calmed
    protected convinced trusted ignored admired excused washed warned fooled rewarded"""

OBJECTS = """lemon spoon candle button needle marble ribbon coin feather pebble whistle thimble walnut dice
    ring shell cork nail match string stamp brush mask glove clock crayon magnet zipper bolt peanut bell
    chalk comb fork fan hook pin sponge tape vase wrench zebra puzzle kite ladle mirror notebook pear rope
    soap ticket violin"""
