"""Every mistake that a user can meet: a code, and one sentence with what was found, what was expected, what
to do.

    FedtuneError          a mistake that somebody can fix; the program ends with exit code 2
      Paused              the run waits for more clients; exit code 75
      ClientFailed        one client's answer is unusable; the round goes on without it
      Refused             a message from the network that is not what it should be; it is dropped and counted

The catalogue below and error_pages.toml are the sources of `fedtune explain` and docs/errors.md; a code is
never reused.
"""

from __future__ import annotations

CATALOGUE: dict[str, str] = {
    # C: the recipe
    "C101": "The recipe has a key that fedtune does not know.",
    "C102": "A value has the wrong type or is out of range.",
    "C103": "A file is not valid TOML, or an argument of a command does not have the required form.",
    "C104": "Two settings cannot be used together.",
    "C105": "The recipe or policy file does not exist or cannot be read.",
    "C106": "An installed package registers an extension that cannot be used.",
    "C107": "An optional package that a setting or a command needs is not installed.",
    # D: data
    "D201": "A data file or folder does not exist.",
    "D202": "The data is empty, or nothing is left after cleaning.",
    "D203": "A row of the data cannot be read.",
    "D204": "A column that the recipe names is not in the data.",
    "D205": "A client has too few training rows.",
    "D206": "A label is not in the label set.",
    "D207": "A text has more tokens than the model or the recipe allows.",
    "D208": "What a recipe or a command asks for needs a Python package that is not installed.",
    "D209": "A selection of rows finds nothing for a client to train on.",
    # M: model and adapter
    "M301": "The model cannot be found or loaded.",
    "M302": "A target module of the adapter is not in the model.",
    "M303": "The tokenizer does not fit the model, or adapters have different tokenizers.",
    "M304": "An adapter, seed file or run was made for another base model, label set or task.",
    "M305": "Tensors do not fit the model or one another.",
    "M306": "The adapter kind does not work with this model or task.",
    "M307": "The tokenizer lacks what chat messages need.",
    "M308": "A client's memory cannot hold the model and an adapter of rank 1.",
    "M309": "A device has too little memory for one example.",
    "M310": "A site has too little free memory for the model and its training.",
    "M311": "A model, tokenizer or chat template took more time or memory than a site gives it.",
    # R: runs
    "R401": "The run folder already exists.",
    "R402": "The run folder does not exist, holds no run, or has no finished round.",
    "R403": "A file of the run is damaged or missing.",
    "R404": "The disk is full or a file cannot be written.",
    "R405": "No client gave a usable answer.",
    "R406": "The run was started with another recipe, base model or data.",
    "R407": "Another process is working on this run.",
    "R408": "Training diverged.",
    "R409": "Fewer clients than the quorum gave a usable answer; the run pauses.",
    "R410": "Too few usable answers for the aggregation rule; the round changes nothing.",
    "R411": "A client's work ended with an unexpected error; the client is left out of the round.",
    "R412": "A group of clients is too small for its sum to be revealed.",
    "R413": "Too few clients came through all steps of a masked sum.",
    "R414": "Clients' votes are not as they should be, or elect nothing.",
    "R421": "A replay on this machine gives other bytes than the run had.",
    "R422": "A canary raised an alarm; the run pauses.",
    # F: Flower
    "F501": "A part of Flower that this command needs is not installed.",
    "F502": "Too few clients are connected or registered.",
    "F503": "A client gave no answer, or answered with an error.",
    "F504": "Flower's simulation engine did not start, or stopped.",
    "F505": "A program that fedtune server or fedtune client runs did not start, or keeps stopping.",
    "F506": "Another fedtune uses this folder.",
    "F507": "A site does not allow what it is asked to do.",
    # W: messages
    "W601": "A message is damaged, cut off, or not in fedtune's format.",
    "W602": "A message was made by a version that this one cannot read.",
    "W603": "A message carries other tensors than were asked for.",
    "W604": "A message belongs to another run, round, client or base model.",
    "W605": "A message was already received.",
    "W606": "A message is larger, or claims more, than allowed.",
    "W607": "Numbers are not finite or out of range.",
    "W608": "A step of a masked sum would show more than the sum, or came out of order.",
    # S: split models
    "S701": "The model cannot be split as asked.",
    "S702": "Client and body service do not hold matching parts of one model.",
    "S703": "This setting skips the body, and cannot work with this cut.",
    "S704": "Rows of one batch influence one another in this model.",
    "S711": "The body service cannot be reached, or does not answer.",
    "S712": "The body service rejected a client's session.",
    "S713": "A micro-batch refers to hidden states that the body service does not hold.",
    "S714": "The body failed on a micro-batch.",
    "S715": "A client sent more micro-batches at once than it may.",
    "S716": "The body service would be reachable over the network without TLS.",
    "S717": "A micro-batch or an answer does not match its number.",
    "S721": "The model has no such emulator, or this is not the run's.",
    # T: keys and trust
    "T701": "A private key, or its folder, can be read by others.",
    "T702": "A key, certificate or allow list is missing, damaged, or does not belong with the others.",
    "T703": "A key is encrypted, and its passphrase is missing or wrong.",
    "T704": "A certificate has expired or is not valid yet, or a clock is wrong.",
    "T705": "The other side has a certificate of another authority, federation or role.",
    "T706": "A client's key is revoked or not on the allow list.",
    "T707": "A signature does not match what was signed.",
    "T708": "A name of a federation, member or host is malformed, taken or unknown.",
    "T709": "An audit log was changed.",
    # E: the exchange of updates between coordinator and clients
    "E801": "The coordinator cannot be reached, or cannot listen on its address.",
    "E802": "The TLS connection to the coordinator failed.",
    "E803": "The coordinator does not have what was asked for.",
    "E804": "The coordinator has no capacity at the moment.",
    "E805": "Another update of this client was already accepted for this round.",
    "E806": "The coordinator does not have this run, round or member, or it may not be asked for.",
    "E807": "A stored file does not match its checksum.",
    "E808": "Client and coordinator do not understand each other.",
    "E809": "A ticket is older than another one that the site has had.",
    # P: privacy
    "P901": "A package that privacy needs is not installed.",
    "P902": "The privacy budget does not allow what is planned.",
    "P903": "Private training left no trace.",
    # X: defects
    "X900": "fedtune met an error that it does not know.",
}


def framed(code: str, found: str, expected: str, do: str) -> str:
    """The parts of an error as its sentence; without `expected`, `found` is a clause of its own."""
    return f"{code}: found {found}, expected {expected}; {do}." if expected else f"{code}: {found}; {do}."


class FedtuneError(Exception):
    """A mistake, in one sentence. `code` is a key of CATALOGUE.

        C102: found rounds = 0, expected a number of 1 or more; change rounds in the recipe.

    Where nothing was expected in place of something else, `sentence` says what happened: FedtuneError("F501",
    sentence="Ray is not installed",
    do="run: pip install ray"). It travels as `found` with an empty `expected`, so the four parts are all
    there is to carry.
    """

    exit_code = 2

    def __init__(
        self, code: str, found: str = "", expected: str = "", do: str = "", *, sentence: str = ""
    ) -> None:
        if code not in CATALOGUE:
            raise KeyError(code)
        self.code, self.found, self.expected, self.do = code, sentence or found, expected, do
        super().__init__(framed(code, self.found, expected, do))


class ClientFailed(FedtuneError):
    """One client's answer is unusable."""


class Paused(FedtuneError):
    """The run stands where it is and can go on."""

    exit_code = 75  # EX_TEMPFAIL


class Refused(FedtuneError):
    """A message from outside is not what it should be."""
