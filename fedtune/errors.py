"""Every mistake that a user can meet: a code, and one sentence with what was found, what was expected, what to do.

    FedtuneError          a mistake somebody can mend; the program ends with exit code 2
      Paused              the run waits for more clients; exit code 75
      ClientFailed        one client's answer is unusable; the round goes on without it
      Refused             a message from the network that is not what it should be; it is dropped and counted

The catalogue below is the source of docs/errors.md; a code is never reused.
"""

from __future__ import annotations

CATALOGUE: dict[str, str] = {
    # C: the recipe
    "C101": "The recipe has a key that fedtune does not know.",
    "C102": "A value in the recipe has the wrong type or is out of range.",
    "C103": "The recipe is not valid TOML, or an argument of a command is not in its form.",
    "C104": "Two settings of the recipe cannot go together.",
    "C105": "The recipe file does not exist or cannot be read.",
    "C106": "An installed package adds something to fedtune that cannot be used.",
    # D: data
    "D201": "A data file or folder does not exist.",
    "D202": "The data is empty, or nothing is left after cleaning.",
    "D203": "A row of the data cannot be read.",
    "D204": "A column that the recipe names is not in the data.",
    "D205": "A client has no rows after the split.",
    "D206": "A label is not in the label set.",
    "D207": "A text is longer than the model's context.",
    "D208": "An optional package that this data source needs is not installed.",
    # M: model and adapter
    "M301": "The model cannot be found or loaded.",
    "M302": "A target module of the adapter is not in the model.",
    "M303": "The model and its tokenizer have different vocabularies.",
    "M304": "An adapter was exported for another base model.",
    "M305": "The tensors offered do not fit the model.",
    "M306": "The adapter kind does not work with this model or task.",
    "M307": "The tokenizer lacks what chat messages need: a chat template, and tokens that know their place in the text.",
    "M308": "A client's memory cannot hold the model and an adapter of rank 1.",
    "M309": "A client's device has too little memory for one example.",
    "M310": "A site has less memory free than the model and what is trained take.",
    # R: runs
    "R401": "The run folder already exists.",
    "R402": "The run folder does not exist or holds no run.",
    "R403": "A state file is damaged.",
    "R404": "The disk is full or a file cannot be written.",
    "R405": "No client gave a usable answer.",
    "R406": "The run was started with another recipe, base model or data.",
    "R407": "Another process is working on this run.",
    "R408": "Training diverged.",
    "R409": "Fewer members than the quorum gave a usable answer; the run pauses.",
    "R410": "Too few usable answers for the aggregation rule; the round changes nothing.",
    "R411": "A client's own work ended with an error that fedtune did not foresee; the client is left out of the round.",
    "R412": "A group of clients is too small for its sum to be read.",
    # F: Flower
    "F501": "Flower, or the part of it that this command needs, is not installed.",
    "F502": "Too few nodes are connected.",
    "F503": "A node answered with an error.",
    "F504": "Flower's simulation engine did not start, or stopped.",
    "F505": "A program that fedtune server or fedtune client looks after does not stay alive.",
    "F506": "The coordinator's or the site's folder is in use by another fedtune.",
    "F507": "A site's policy does not allow what it is asked.",
    # W: messages
    "W601": "A message is not in fedtune's wire format, or is truncated.",
    "W602": "A message was made by a version that this one cannot read.",
    "W603": "A message carries other tensors than were asked for.",
    "W604": "A message belongs to another run, round, client or base model.",
    "W605": "A message was already received.",
    "W606": "A message claims more than the declared bound.",
    "W607": "A message holds numbers that are not finite or out of range.",
    # S: split models
    "S701": "The model cannot be cut as asked.",
    "S702": "A part of a model is not the part that was asked for.",
    "S703": "The shortcut from head to tail cannot see what this setting needs.",
    "S704": "Rows of one batch would change one another in this model.",
    "S711": "The body service cannot be reached, or does not answer.",
    "S712": "The body service does not admit this client: its token, its session or the number of sessions.",
    "S713": "A micro-batch refers to hidden states that the body service does not hold.",
    "S714": "The body failed on a micro-batch.",
    "S715": "More micro-batches are in flight than were granted.",
    "S716": "The body service would be open to the network without TLS.",
    "S717": "A micro-batch or an answer is not the one that its number says.",
    # T: keys and trust
    "T701": "A private key, or its folder, can be read by others.",
    "T702": "A key, certificate or allow list is missing, damaged, or does not belong to the others.",
    "T703": "A key is encrypted, and its passphrase is missing or wrong.",
    "T704": "A certificate has ended or is not valid yet, or a clock is wrong.",
    "T705": "A peer is not who it should be: its certificate is of another authority, federation or role.",
    "T706": "A client's key is revoked or not on the allow list.",
    "T707": "A signature does not fit what was signed.",
    "T708": "A name of a federation, member or host is not in its form, taken or unknown.",
    # E: the exchange
    "E801": "The exchange cannot be reached.",
    "E802": "A secure connection to the exchange was refused by one of its ends.",
    "E803": "The exchange does not have what was asked for.",
    "E804": "The exchange has no room at the moment.",
    "E805": "Another update of this client was already accepted for this round.",
    "E806": "The run is not known here, the client is no member, or the round is not open.",
    "E807": "A stored object is damaged.",
    "E808": "The other side of the exchange broke its protocol.",
}


class FedtuneError(Exception):
    """A mistake, in one sentence. `code` is a key of CATALOGUE."""

    exit_code = 2

    def __init__(self, code: str, found: str, expected: str, do: str) -> None:
        if code not in CATALOGUE:
            raise KeyError(code)
        self.code, self.found, self.expected, self.do = code, found, expected, do
        super().__init__(f"{code}: found {found}, expected {expected}; {do}.")


class ClientFailed(FedtuneError):
    """One client's answer is unusable."""


class Paused(FedtuneError):
    """The run stands where it is and can go on."""

    exit_code = 75  # EX_TEMPFAIL


class Refused(FedtuneError):
    """A message from outside is not what it should be."""
