"""Real servers on 127.0.0.1 that speak the protocols of the clouds, for rehearsals and tests.

They encode our reading of those services: what runs against them has not thereby run on a cloud.
Only the command line and tests import this package; the product itself has no rehearsal branch.
"""
