# SPDX-License-Identifier: Apache-2.0

import types

from nova_dmigrate import exception
from nova_dmigrate.virt.policy import Decision, Policy, decide
from tests import base

#: Flavor, image and metadata say; metadata count; what is decided, by whom.
TABLE = (
    (None, None, None, False, "disabled", "default"),
    (None, None, None, True, "disabled", "default"),
    ("preferred", None, None, False, "preferred", "flavor"),
    ("required", "disabled", "preferred", True, "required", "flavor"),
    ("disabled", "required", "required", True, "disabled", "flavor"),
    (None, "preferred", None, False, "preferred", "image"),
    (None, "disabled", "required", True, "disabled", "image"),
    (None, None, "required", True, "required", "metadata"),
    (None, None, "required", False, "disabled", "default"),
    (None, None, "nonsense", False, "disabled", "default"),
    (" Preferred ", None, None, False, "preferred", "flavor"),
)


def instance(flavor: str | None, image: str | None, metadata: str | None) -> types.SimpleNamespace:
    def with_value(key: str, value: str | None) -> dict[str, str]:
        return {} if value is None else {key: value}

    return types.SimpleNamespace(
        uuid="4f1c",
        flavor=types.SimpleNamespace(extra_specs=with_value("dmigrate:policy", flavor)),
        system_metadata=with_value("image_dmigrate_policy", image),
        metadata=with_value("dmigrate_policy", metadata),
    )


class PolicyTest(base.TestCase):
    def test_flavor_image_and_metadata_decide_in_this_order(self):
        for flavor, image, metadata, counts, policy, source in TABLE:
            decision = decide(instance(flavor, image, metadata), Policy.DISABLED, counts)
            self.assertEqual(Decision(Policy(policy), source), decision)

    def test_the_default_is_the_operators(self):
        decision = decide(instance(None, None, None), Policy.REQUIRED, True)
        self.assertEqual(Decision(Policy.REQUIRED, "default"), decision)

    def test_what_is_no_policy_is_told_with_who_has_said_it(self):
        for values, source in (
            (("yes", None, None), "flavor"),
            ((None, "", None), "image"),
            ((None, None, "required;"), "metadata"),
        ):
            error = self.assertRaises(
                exception.ConfigurationError, decide, instance(*values), Policy.DISABLED, True
            )
            self.assertIn(f"{source} of instance 4f1c", str(error))
            self.assertIn("disabled, preferred, required", str(error))

    def test_an_instance_without_extra_specs_has_none(self):
        nothing = instance(None, None, None)
        nothing.flavor.extra_specs = nothing.metadata = None
        self.assertEqual(Policy.DISABLED, decide(nothing, Policy.DISABLED, True).policy)
