from tests.trust.renewing import scene  # noqa: F401
