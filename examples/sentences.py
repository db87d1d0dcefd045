"""The sentences of the support-desk world, in two splits that share no template.

Owns the wording only; world.py knows how a ticket is put together. `(a|b)` holds alternatives,
`{slot}` is filled by world.py, and `{ref}` becomes "order A12-3456" or a phrase without a number
such as "my order".
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The sentences of one side of the train/eval border."""

    openings: tuple[str, ...]
    problems: dict[str, tuple[str, ...]]
    orders: tuple[str, ...]
    no_orders: tuple[str, ...]
    fillers: tuple[str, ...]
    closings: tuple[str, ...]

    def sentences(self) -> set[str]:
        """Every sentence template of the split, whatever its role."""
        pools = (
            self.openings,
            self.orders,
            self.no_orders,
            self.fillers,
            self.closings,
            *self.problems.values(),
        )
        return {sentence for pool in pools for sentence in pool}


# Cue phrases of each label, for the short training tickets below. EVAL uses the same words in other
# sentences.
_CUES = {
    "billing": "an invoice|a bill|a refund|the payment|a wrong charge|my credit card|a fee|the "
    "VAT|a receipt|a voucher"
    "|the price|a debit|my bank|the amount|a bank transfer|a payment reminder|money that you "
    "charged|what I paid"
    "|a discount|a card payment|being billed twice",
    "shipping": "a parcel|the delivery|the courier|the tracking|a package|the carrier|the tracking "
    "number|a shipment"
    "|customs|the driver|the depot|express delivery|the delivery address|the postman|a "
    "damaged box|shipping"
    "|what was delivered|a neighbour who took the parcel|the shipping date|a lost package|a "
    "late delivery",
    "account": "my password|my login|my account|my profile|my user name|the email address of my "
    "account|signing in"
    "|a locked account|the two-factor code|my registration|closing my account|deleting my "
    "account|the reset mail"
    "|my personal data|two profiles|the verification mail|logging in|a stranger in my "
    "account|a new email address"
    "|a new password|my user profile|a mail to reset the password",
    "technical": "the app|a crash|an error message|the firmware|Bluetooth|the battery|the "
    "screen|the display|the motor"
    "|the wifi|the website|my browser|installing the software|a loud noise|a red light|an "
    "update|the power button"
    "|the {item}, which does not work|the {item}, which stopped working|the {item}, which "
    "overheats|a cable"
    "|a {device} that does not connect",
    "other": "your opening hours|your shop in {city}|a job|your catalogue|an interview|a "
    "magazine|sponsoring"
    "|a conference|a gift|your founder|a school visit|the next sale|recycled material|a "
    "suggestion|a new colour"
    "|your company|friendly advice|your wonderful service|where it is made|a present|a "
    "recommendation|a compliment"
    "|a lovely card|a student job|an open shop|five stars",
}
_CUE_FRAMES = (
    "I have a question about ({cue}).",
    "It is about ({cue}).",
    "({cue}): what can you do for me?",
    "I write because of ({cue}).",
    "Who can talk to me about ({cue})?",
    "({cue})!",
    "My message is about ({cue}), and also ({cue}).",
    "({cue}), please.",
    "Can you say something about ({cue}) and {ref}?",
    "What about ({cue})? And what about ({cue})?",
    "({cue}), ({cue}), since {day}.",
    "Tell me more about ({cue}).",
)


def _cue_sentences(label: str) -> tuple[str, ...]:
    return tuple(frame.replace("{cue}", _CUES[label]) for frame in _CUE_FRAMES)


TRAIN = Split(
    openings=(
        "Hi,",
        "Hello,",
        "Dear support team,",
        "Hi there, {name} here.",
        "Good (morning|evening|day),",
        "Hello, my name is {name}.",
        "Dear Sir or Madam,",
        "Hey team,",
        "(Hi|Hello), this is {name} from {city}.",
        "To whom it may concern,",
        "I hope you can help me.",
        "I need (some|a little) help, please.",
        "I have a (question|problem|request).",
        "Sorry to bother you (again|on a {day}).",
        "This is the (first|second|third) time that I write to you.",
    ),
    problems={
        "billing": (
            *_cue_sentences("billing"),
            "I was (charged|billed) twice for {ref}.",
            "My credit card was charged {amount} euros (two|three) times for the {item}.",
            "The invoice for {ref} shows (the wrong amount|a wrong total|{amount} too much).",
            "Please send me (an invoice|a receipt|a bill) for the {item}.",
            "I am still waiting for my refund of {amount} euros.",
            "When will I get my money back for {ref}?",
            "The discount (code|voucher) was not (applied|deducted) when I paid.",
            "Why did you (take|debit|withdraw) {amount} from my bank account in {month}?",
            (
                "My payment by (card|bank transfer|PayPal) was declined although there is money "
                "on the card."
            ),
            "There is a fee of {amount} on my bill that I do not understand.",
            "I paid {amount} but the receipt says {amount}.",
            "You promised a refund in {month}, and nothing has been paid (out|back) yet.",
            "Can I pay for {ref} in (monthly instalments|two payments)?",
            "The VAT is missing on the invoice for the {item}.",
            "I got a payment reminder although {ref} is already paid.",
            "Please cancel the direct debit and refund the {amount} euros.",
            "The price on the bill is higher than the price in the shop.",
            "My bank statement (shows|lists) a charge of {amount} from you that I never made.",
            "I would like to change the payment method for {ref} to (invoice|credit card).",
            "The gift voucher over {amount} was not accepted at payment.",
            "I need a corrected invoice with our company tax number.",
            "You overcharged me by {amount} euros.",
            "Could you explain the charges on the {month} invoice?",
            "I returned the {item} in {month} and have not been refunded.",
            "The refund for {ref} is {amount} euros too low.",
            "A (monthly|yearly) subscription fee was debited without my consent.",
            "My card was billed in the wrong currency.",
            "I never received a credit note for the returned {item}.",
            "The total that I was asked to pay does not match the price of the {item}.",
            "Billing made (a mistake|an error) on {ref}: the amount is wrong.",
            "Is it possible to get a price reduction, since the voucher expired on {day}?",
            "Two payments of {amount} left my bank for a single {item}.",
        ),
        "shipping": (
            *_cue_sentences("shipping"),
            "My parcel has (not|never) arrived.",
            "Where is {ref}? It should have been delivered on {day}.",
            "The tracking page has shown no movement since {day}.",
            "The courier left the package (in the rain|at the wrong door|with a stranger).",
            "The {item} was delivered to the wrong address in {city}.",
            "How long does delivery to {city} take?",
            "Can you ship {ref} to {city} instead?",
            "The tracking number for {ref} does not exist at the carrier.",
            "The parcel with the {item} arrived (damaged|crushed|wet).",
            "I ordered a {item}, but the box that was delivered contained a {item}.",
            "The package has been stuck (at customs|in the depot) since {month}.",
            "The driver says he delivered {ref}, but nothing is here.",
            "Please hold the delivery until {day}, I am on holiday.",
            "{ref} was promised for {day} and has not been dispatched.",
            "When will the {item} be shipped?",
            "One of the two parcels of {ref} is lost.",
            "I would like express shipping for {ref}.",
            "Only half of the delivery has arrived, the {item} is missing from the box.",
            "The carrier returned the package to you without ringing the bell.",
            "Please change the delivery address of {ref} to {city}.",
            "The shipment has been on its way for {number} hours.",
            "Do you deliver to a parcel locker in {city}?",
            "The courier came on {day} and nobody was at home, can he come again?",
            "I have been waiting for the {item} since {month}, has it left the warehouse?",
            "The tracking says delivered, but my mailbox is empty.",
            "Which carrier (brings|ships) the {item}?",
            "Delivery of {ref} is late by (two|three) weeks.",
            "The package was handed to a neighbour whom I do not know.",
            "I need a return label to ship the {item} back.",
            "The parcel was open when the postman brought it and the {item} was gone.",
            "Can I collect the parcel at the depot in {city}?",
            "Your warehouse sent the {item} to my old address.",
        ),
        "account": (
            *_cue_sentences("account"),
            "I forgot my password.",
            "I cannot log in to my profile (any more|since {day}).",
            "The password reset mail never (comes|arrives).",
            "My (account|login) is locked after too many attempts.",
            "Please (delete|close|remove) my account and all personal data.",
            "How do I change the email address of my account?",
            "Somebody else has logged in to my profile from {city}.",
            "I want to change my (user name|last name) after my wedding.",
            "My two-factor code is not accepted when I sign in.",
            "I have two accounts, please merge them.",
            "The verification mail for my registration did not come.",
            "I got a new phone number and can no longer confirm my login.",
            "Please unsubscribe my profile from the newsletter.",
            "I think my account was hacked on {day}.",
            "When I sign in it says that the user does not exist.",
            "Why was my account (suspended|blocked|deactivated)?",
            "I would like to add my (husband|wife|colleague) as a second user of my account.",
            "How can I update the date of birth in my profile?",
            "The password that I chose is refused again and again.",
            "I no longer have access to the email address that I registered with.",
            "Please send me a link to reset my password.",
            "I cannot see {ref} in my account history after signing in.",
            "My profile shows the name of (another|a different) customer.",
            "Please tell me which personal data you keep about my user profile.",
            "Signing up fails because my email address is already registered.",
            "The login code by text message never reaches my mobile number.",
            "I want to switch my account from private to business customer.",
            "Please unlock my user account, I typed the wrong password.",
            "My membership level in the profile is wrong after {ref}.",
            "{ref} was made as a guest, can you link it to my account?",
            "I want to turn on two-factor sign-in for my login.",
            "Can I use the same email for two user profiles?",
        ),
        "technical": (
            *_cue_sentences("technical"),
            "The {item} does not (turn|switch) on.",
            "Your app crashes on my {device} (every time|after a minute).",
            "The {item} shows error E-{number}.",
            "The firmware update of the {item} (failed|stopped) at {number} percent.",
            "The {item} from {ref} does not connect to Bluetooth.",
            "The website freezes on my {device} when I open the basket.",
            "The battery of the {item} is empty after an hour.",
            "Since the last update the {item} makes a loud noise.",
            "How do I (reset|restart) the {item} to factory settings?",
            "The app shows a (blank|black|white) screen on my {device}.",
            "The {item} overheats and switches itself off.",
            "I cannot pair the {item} with my {device}.",
            "The display of the {item} flickers.",
            "The power button of the {item} is broken.",
            "The search on your website gives a server error.",
            "The {item} in {ref} came with a defective cable and does not charge.",
            "The software for the {item} does not install on my {device}.",
            "Which driver does the {item} need on a {device}?",
            "There is a bug in the app: the page does not load.",
            "The wifi connection of the {item} drops every (hour|few minutes).",
            "The manual of the {item} does not explain how to set it up.",
            "The {item} stopped working after (two|three) days.",
            "The motor of the {item} from {ref} is stuck.",
            "The app does not start after the update on {day}.",
            "A red light blinks on the {item} and nothing works.",
            "The sound of the {item} is (distorted|too quiet).",
            "Error message {number} appears when I open the app.",
            "The sensor of the {item} measures nonsense.",
            "The {item} is not recognised by my {device} over USB.",
            "The video on the product page does not play in my browser.",
            "The {item} smells of burnt plastic when I plug it in.",
            "Your website is (very slow|not loading) on a {device}.",
        ),
        "other": (
            *_cue_sentences("other"),
            "What are the opening hours of your shop in {city}?",
            "I just want to say thank you for the great service.",
            "Are you hiring in {city}?",
            "I am a student and write a thesis about online shops, may I interview you?",
            "Do you plan to sell a blue {item}?",
            "Our school would like to visit your company in {month}.",
            "I love the {item} from {ref}, five stars!",
            "Would you sponsor our sports club in {city}?",
            "Is the {item} made from recycled material?",
            "Please send me your (printed|new) catalogue.",
            "I am a journalist and would like to talk to your press office.",
            "Your staff in {city} were very friendly.",
            "Will you have a sale in {month}?",
            "Which {item} would you recommend as a present for my mother?",
            "We are a small company and would like to become a partner.",
            "I have an idea for a new {item}.",
            "Do you have a store near {city}?",
            "The music in your shop is too loud.",
            "How many people work for your company?",
            "I wrote a blog post about the {item} from {ref}, feel free to share it.",
            "Is there a job opening for a designer?",
            "Thank you for the lovely card that came with {ref}.",
            "I would like to praise {name}, who gave me wonderful advice.",
            "Where are your products made?",
            "Can I bring my dog to the shop in {city}?",
            "Do you donate old stock to charity?",
            "I would like to suggest a vegan version of the {item}.",
            "Could your founder give a talk at our conference in {month}?",
            "When will the {item} be back in stock?",
            "The {item} is the best gift I ever bought, compliments to the team!",
            "May we use a photo of the {item} in our magazine?",
            "Are your shops open on {day}?",
        ),
    },
    orders=(
        "My order number is {order}.",
        "Order {order}.",
        "The order number is {order}.",
        "It is about order {order}.",
        "Order no. {order}, placed on {day}.",
        "(Ref|Reference|Order): {order}.",
        "You can find it under {order}.",
        "I am writing about {order}.",
        "(Subject|Concerning|Regarding) order {order}:",
        "The confirmation mail says {order}.",
        "Number: {order}",
        "(#|Nr. |No. ){order}.",
        "I placed order {order} in {month}.",
        "See order {order} from {day}.",
        "My number is {order}.",
        "Your mail of {day} speaks of {order}.",
        "Please check {order} for me.",
        "The number {order} is on my paper.",
        "{order}",
        "{order} is the number of the order.",
        "For your records: {order}.",
    ),
    no_orders=(
        "I do not have the order number at hand.",
        "I have not ordered anything yet.",
        "I lost the order confirmation.",
        "There is no order yet.",
        "I cannot find my order number.",
        "My customer number is {number}.",
    ),
    fillers=(
        "My phone number is {phone}.",
        "I have been your customer for {number} days.",
        "I already called on {day}.",
        "Nobody answered my last message.",
        "I was told to write to you.",
        "My colleague {name} had the same.",
        "I live in {city}.",
        "It has been like this since {month}.",
        "I am not angry, just curious.",
        "I looked at the help page but did not find it.",
        "This is urgent.",
        "The hotline kept me waiting for {number} minutes.",
        "I wrote about this in {month} already.",
        "You can reach me at {phone} on {day}.",
        "Case {number} was closed without an answer.",
        "This is quite important to me.",
        "I am not at home before {day}.",
        "I waited for some days before I wrote this.",
        "{phone} is my number at home.",
        "Call {phone} at any time.",
        "I had the number {number} in the queue.",
        "I came home on {day} and thought of writing.",
        "I would like a quick answer.",
        "In {city} it is {number} degrees today.",
        "I also have a {item} from you, and I like it.",
        "My {item} is fine, by the way.",
        "I write this on my {device}.",
        "In {month} I bought a {item} for {name}.",
    ),
    closings=(
        "Thanks!",
        "Thank you.",
        "Kind regards, {name}",
        "Best, {name}",
        "Please help.",
        "Please answer soon.",
        "Many thanks and best regards, {name}",
        "I look forward to your answer.",
        "Thanks in advance, {name}",
        "Yours sincerely, {name}",
        "Have a nice {day}!",
        "Greetings from {city}, {name}",
        "Cheers, {name}",
    ),
)

EVAL = Split(
    openings=(
        "Hello support,",
        "Good afternoon,",
        "Hi, I am {name}.",
        "Dear team,",
        "Hello from {city},",
        "I have a short question.",
        "I would like your help with something.",
        "Hi team, {name} again.",
    ),
    problems={
        "billing": (
            "The {item} was billed two times on my credit card.",
            "I have not got the refund for {ref} yet.",
            "The amount on my invoice is wrong, I paid {amount} euros.",
            "Can you send me the receipt for {ref} as a PDF?",
            "There is a charge of {amount} on my card that I do not recognise.",
            "The voucher was not deducted from the price of {ref}.",
            "Please refund the {amount} euros that were debited on {day}.",
            "My card payment for {ref} was declined.",
            "I was asked to pay a reminder fee of {amount}, but the bill was paid in {month}.",
            "The invoice of {ref} lacks the VAT.",
            "I want to pay by bank transfer and not by card.",
            "My bank says that you charged {amount} too much.",
        ),
        "shipping": (
            "{ref} was not delivered on {day} as promised.",
            "The parcel arrived with a damaged box and the {item} is missing.",
            "According to the tracking, the package is still in the depot in {city}.",
            "Can the courier deliver {ref} on {day}?",
            "I am waiting for the delivery of a {item} since {day}.",
            "Has {ref} been shipped?",
            "The driver left my parcel with a neighbour in {city}.",
            "The carrier lost the package with my {item}.",
            "The tracking number of my shipment shows nothing.",
            "Please ship the {item} to my address in {city}.",
            "The package of {ref} is stuck at customs.",
            "Is express delivery to {city} possible, and which carrier do you use?",
        ),
        "account": (
            "I cannot sign in because I forgot the password.",
            "Please change the email address in my profile.",
            "My user account has been locked since {day}.",
            "The mail to reset my password does not arrive.",
            "I would like to close my account.",
            "A stranger logged in to my account on {day}.",
            "The two-factor code for my login never comes.",
            "Please merge the profiles of my wife and me into one account.",
            "My registration fails because the verification mail is missing.",
            "{ref} is not listed in my profile although I was signed in.",
            "Which personal data is kept in my account, and can you delete it?",
            "How can I change my user name?",
        ),
        "technical": (
            "The app crashes when I open it on my {device}.",
            "The {item} does not connect to my {device} over Bluetooth.",
            "The {item} from {ref} stopped working, a red light blinks.",
            "After the firmware update the screen of the {item} is black.",
            "The {item} switches itself off after {number} minutes and overheats.",
            "My {device} shows error message {number} on your website.",
            "The battery of my {item} does not charge.",
            "I cannot install the software of the {item}.",
            "The {item} makes a loud noise and the motor is stuck.",
            "The website does not load in my browser.",
            "The wifi of the {item} from {ref} drops.",
            "How do I restart the {item}? The power button does not work.",
        ),
        "other": (
            "Is your shop in {city} open on {day}?",
            "Thank you for the friendly advice, I love the {item}.",
            "Do you have a job for a student in {month}?",
            "I would like to suggest a new colour for the {item}.",
            "Which {item} do you recommend as a gift?",
            "Our magazine would like to interview the founder of your company.",
            "Where is the {item} made, and is the material recycled?",
            "Compliments to {name}, wonderful service with {ref}!",
            "Would your company like to sponsor our conference in {city}?",
            "When do you have the next sale?",
            "Please send the printed catalogue to our school.",
            "Five stars for the lovely card in {ref}.",
        ),
    },
    orders=(
        "The number of my order is {order}.",
        "This concerns order {order}.",
        "My order: {order}.",
        "I ordered on {day}, number {order}.",
        "The mail from {month} says order {order}.",
        "Please look at {order}.",
    ),
    no_orders=(
        "I do not know my order number.",
        "I have no order with you so far.",
        "My customer number at your shop is {number}.",
    ),
    fillers=(
        "I called {phone} on {day}, but nobody answered.",
        "I am at home in {city} until {month}.",
        "My last message was case {number}.",
        "It is quite urgent.",
        "I have been waiting for an answer since {day}.",
        "I did not find it on the help page.",
    ),
    closings=(
        "Thank you very much, {name}",
        "Regards, {name}",
        "Best regards from {city}",
        "Thanks for your help!",
        "Please write to me soon, {name}",
        "Have a good day!",
    ),
)
