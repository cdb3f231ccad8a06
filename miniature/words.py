"""Words of several languages, for the miniature's tasks: lists, and nothing else."""

from __future__ import annotations

ENGLISH_TEXT = """
able about above accident across address adventure afternoon agreement airport almond alphabet
although animal answer apple apricot april architecture army arrival artichoke asparagus assassin
attention august autumn avocado balance balloon banana barrel basket battery beautiful bedroom
beginning believe berry between bicycle biscuit blackberry blanket blossom blueberry bookkeeper
boomerang bottle breakfast bridge broccoli brother bubble butter butterfly cabbage calendar camera
candle capital carpenter carriage carrot castle cathedral celebration cereal chair challenge
cheese cherry chicken children chocolate christmas cinnamon circle classroom climate coconut
coffee committee community compass computer concert connection copper corridor cottage cotton
country cousin cranberry cricket crocodile cucumber culture curtain daughter december decision
deer desert dictionary different difficult dinner discussion distance doctor dolphin dragon dream
drummer education eleven elephant embarrass engine envelope evening everything exercise experience
eyebrow factory family farewell february feeling festival finger firefly flower forest forgotten
fountain friend future garden garlic gentleman giraffe glacier goggles government grammar
grandmother grapefruit grass guitar hammer happiness harbour harvest headache health helicopter
hippopotamus history holiday honey horizon horse hospital hundred hurricane illness imagination
immediate insect island january journey juggle jungle kangaroo keyboard kindergarten kingdom
kitchen knowledge ladder language lantern laughter lavender lawyer leather lemon letter lettuce
library lightning lollipop luggage machine mammal mango marriage mathematics meadow medicine melon
memory message millennium minimum mirror mississippi monday monkey moon morning mosquito mountain
mushroom music narrative nature necessary needle neighbour newspaper night noodle november nutmeg
occurrence ocean october office onion opinion opportunity orange orchestra ostrich oxygen paper
paragraph parallel parrot passenger peach peanut pencil pepper photograph piano pineapple planet
pleasure pocket poem possess potato practice president pressure professor programmer pudding
pumpkin puzzle question quick rabbit radish railway rainbow raspberry reason recipe referee
remember restaurant rhythm river robot sandwich saturday scissors season secret september
seventeen shadow shepherd silver sister skyscraper sleep snowflake soccer solar spaghetti sparrow
spinach squirrel station statistics strawberry street struggle student success sugar summer sunday
sunflower surprise swimming symphony syllable teacher telephone temperature tennis theatre
thirteen thunder thursday tobacco together tomato tomorrow traffic treasure tree triangle truth
tuesday turkey turnip umbrella understand universe vacuum valley vanilla vegetable village violin
volcano wallet walnut waterfall watermelon weather wednesday weekend welcome whisper wilderness
window winter woodpecker world yellow yesterday yogurt zebra zeppelin zero zucchini
"""

OTHER_LANGUAGES_TEXT = """
abend apfel arbeit ausgang bahnhof baum bruder buch donnerstag erdbeere fahrrad feuerwehr flugzeug
freitag freude garten geburtstag gesundheit gewitter glocke himbeere hoffnung jahrhundert
kartoffel katze kirsche kugelschreiber landschaft lehrer mittagessen montag nachbar pfannkuchen
regenschirm schmetterling schnecke schule sommer sonne spiegel tasse teller umwelt wasser
winterreifen wolke zeitung zwiebel zimmer bonjour boulangerie bouteille brouillard chapeau
chaussette cheval couleur courage demain fenetre feuille fleur framboise fromage grenouille
horloge jardin lumiere maison montagne nuage oiseau ordinateur papillon parapluie poisson pomme
poubelle printemps quelque rencontre sourire tonnerre travail vacances village voiture abuelo
aguacate alegre amarillo amigo arroz biblioteca bocadillo caballo cabeza calle camarero cebolla
ciudad corazon cuchara desayuno escalera escuela espejo estrella ferrocarril fresa guitarra
hermano invierno izquierda lluvia mariposa mercado naranja novela palabra pantalla pelota pizarra
playa primavera puerta queso sandia semana tortuga ventana verano zapato albero amore arancia
bambino bicchiere cappuccino carrozza cavallo chiesa cipolla cocomero colazione farfalla finestra
formaggio fragola giallo giardino lampone libreria mattina mezzanotte mozzarella notte ombrello
orologio pomeriggio ragazza settembre sorella spiaggia stazione strada tramonto uccello zucchero
abacaxi amanhecer borboleta cachorro cidade cozinha janela laranja livro morango palavra passaro
pessoa queijo saudade sorriso terra trabalho aardappel appelmoes boerderij fiets gezellig groente
kaas lopen molen sinaasappel straat tulp vlinder water zeehond zon chleb drzewo jabłko kwiat
książka lato miasto motyl niedziela ogród okno pies pociąg rzeka słońce szczęście truskawka zamek
żółty älg äpple fjäril flicka hallon jordgubbe kärlek sjö snö sommar vinter hyvää järvi kahvi
kissa koira mansikka metsä perhonen talvi yö ağaç çilek çiçek deniz güneş kalp kelebek kitap kuş
öğretmen yağmur yıldız crème brûlée garçon élève forêt hôtel déjà noël leçon château übung straße
größe mädchen brücke frühling königin tür vögel niño mañana español corazón canción jalapeño
piñata árbol coração maçã irmão avó pão ação città perché caffè università lunedì voilà naïve
señor škola řeka říjen žena český měsíc počasí
"""

SYLLABLES_TEXT = """
ba be bi bo bu ca ce co da de di do du fa fe fi fo ga ge go ha he hi ho ja jo ka ke ki ko la le li
lo lu ma me mi mo mu na ne ni no nu pa pe pi po qua que ra re ri ro ru sa se si so su ta te ti to
tu va ve vi vo wa we wi ya ye za zo al an ar as at el en er es et il in ir is it ol on or os ot ul
un ur bra cre dri fro gla pli pre sta str tra tri spa sch thr cha che ght ck ll ss tt rr nn mm pp
ff ee oo
"""

ENGLISH = tuple(ENGLISH_TEXT.split())
OTHER_LANGUAGES = tuple(OTHER_LANGUAGES_TEXT.split())
SYLLABLES = tuple(SYLLABLES_TEXT.split())
