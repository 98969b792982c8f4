"""Text of a known length, for prompts: common English words, each one token of most tokenizers."""

from __future__ import annotations

import random

_TEXT = """
about above across after again age ago air all almost along also always animal answer any
appear area arm art ask back ball bank base bear beat bed before begin best better between big
bird black block blue board boat body book born both box boy bread break bright bring broad
brother build burn busy buy call camp capital captain car card care carry case catch cause cell
center chair chance change chart check chief child choose church circle city claim class clean
clear climb clock close cloud coast coat cold color come common copy corn corner correct cost
cotton could count country course cover create crop cross crowd current cut dance danger dark
day dead deal dear death deep degree depend desert design did die direct discuss divide doctor
dollar done door double down draw dream dress drink drive drop dry during each ear early earth
ease east eat edge effect egg eight either else end enemy energy engine enough enter equal even
evening event ever every exact example except excite exercise expect experience eye face fact
fair fall family famous far farm fast fat father favor fear feed feel feet few field fight
figure fill final find fine finger finish fire first fish fit five flat floor flow flower fly
follow food foot force forest form forward four fraction free fresh friend from front fruit full
fun game garden gas gather gave general gentle get girl give glad glass goal gold good got grand
grass gray great green grew ground group grow guess guide had hair half hand happen happy hard
has hat have head hear heart heat heavy held help here high hill him his history hit hold hole
home hope horse hot hour house how huge human hundred hunt hurry ice idea inch include indicate
industry insect instrument interest invent iron island job join joy jump just keep kept key kill
kind king knew know lady lake land language large last late laugh law lay lead learn least leave
left leg length less let letter level lie life lift light like line list listen little live
locate log lone long look lost lot loud love low machine made main major make man many map mark
market mass master match material matter may mean meant measure meat meet melody men metal
method middle might mile milk million mind mine minute miss mix modern moment money month moon
more morning most mother motion mount mountain mouth move much multiply music must name nation
natural nature near necessary neck need neighbor never new next night nine noise noon north
nose note nothing notice noun now number object observe occur ocean off offer office often oil
old once one only open operate opposite order organ original other our out over own page paint
pair paper paragraph parent part particular party pass past path pattern pay people perhaps
period person phrase pick picture piece pitch place plain plan plane planet plant play please
plural poem point poor populate port pose position possible post pound power practice prepare
present press pretty print probable problem process produce product proper property protect
prove provide pull push put quart question quick quiet quite race radio rail rain raise ran
range rather reach read ready real reason receive record red region remember repeat reply
represent require rest result rich ride right ring rise river road rock roll room root rope rose
round row rub rule run safe said sail salt same sand sat save saw say scale school science score
sea search season seat second section see seed seem segment select self sell send sense sent
sentence separate serve set settle seven several shall shape share sharp sheet shell shine ship
shoe shop shore short should shoulder shout show side sight sign silent silver similar simple
since sing single sister sit six size skill skin sky sleep slip slow small smell smile snow soft
soil soldier solution solve some son song soon sound south space speak special speech speed
spell spend spoke spot spread spring square stand star start state station stay steam steel step
stick still stone stood stop store story straight strange stream street stretch string strong
student study subject substance subtract success such sudden suffix sugar suggest suit summer
sun supply support sure surface surprise swim syllable symbol system table tail take talk tall
teach team teeth tell temperature ten term test than thank that their them then there these they
thick thin thing think third this those though thought thousand three through time tiny tire
together told tone took tool top total touch toward town track trade train travel tree triangle
trip trouble truck true try tube turn twenty two type under unit until use usual valley value
vary verb very view village visit voice vowel wait walk wall want war warm was wash watch water
wave way wear weather week weight well went were west what wheel when where which while white
who whole whose why wide wife wild will win wind window wing winter wire wish with woman wonder
wood word work world would write written wrong yard year yellow yes yet you young your
"""
WORDS = tuple(_TEXT.split())


def words(rng: random.Random, count: int) -> str:
    """So many random words. Each counts for about one token."""
    return " ".join(rng.choices(WORDS, k=count))
