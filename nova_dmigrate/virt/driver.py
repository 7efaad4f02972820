# SPDX-License-Identifier: Apache-2.0
"""The driver that Nova loads: libvirt's, which asks `relaying` to migrate where policy says so.

It overrides what has had the same form in many releases of Nova, and passes on what it does not
know.
"""

import functools
import inspect
import logging
import threading
from collections.abc import Callable
from typing import Any

import nova.conf
from nova import exception as nova_exception
from nova.virt.libvirt import driver
from nova.virt.libvirt import migration as libvirt_migration
from oslo_config import cfg

from nova_dmigrate import exception
from nova_dmigrate.virt import configuration
from nova_dmigrate.virt.policy import Policy, decide

LOG = logging.getLogger(__name__)
CONF = nova.conf.CONF
configuration.register(CONF)

TRAIT = "CUSTOM_DMIGRATE"
_MIB = 1 << 20
_NOT_WARMED = "Instance %s will not be warmed up"
#: In the system metadata of a server that was evacuated, until it is started.
_EVACUATED = "dmigrate_evacuated"
_NOT_USABLE = "nova-dmigrate cannot be used, it may lack a package: %s"


def _taking_the_same_as(overridden: Any) -> Callable[[Any], Any]:
    """For a method that passes on what it does not know: the arguments that it shows are those of
    the one that it overrides, of which there are more from release to release.
    """

    def decorate(method: Any) -> Any:
        method.__signature__ = inspect.signature(overridden)
        return method

    return decorate


class DMigrateDriver(driver.LibvirtDriver):  # type: ignore[misc]
    """libvirt's driver with live migrations through the relays of nova-dmigrate."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Of live migrations from here whose operation has not begun, by the instance's UUID.
        self._decided: dict[str, Policy] = {}
        #: Live migrations from here that go through relays, or may, by the instance's UUID.
        self._relaying: dict[str, Any] = {}
        self._evacuations: Any = None
        self._config: cfg.ConfigOpts | None = None
        self._config_lock = threading.Lock()

    def update_provider_tree(
        self, provider_tree: Any, nodename: Any, allocations: Any = None
    ) -> None:
        """Have schedulers find hosts with this driver."""
        super().update_provider_tree(provider_tree, nodename, allocations)
        provider_tree.add_traits(nodename, TRAIT)

    # Before anything is claimed

    def check_can_live_migrate_destination(
        self,
        context: Any,
        instance: Any,
        src_compute_info: Any,
        dst_compute_info: Any,
        block_migration: Any = False,
        disk_over_commit: Any = False,
    ) -> Any:
        """At the destination: refuse what is required and cannot be.

        :raises MigrationPreCheckError: it cannot.
        """
        # Before the driver leaves a file on the storage for the source to find
        self._check(instance, self._check_destination, dst_compute_info)
        return super().check_can_live_migrate_destination(
            context,
            instance,
            src_compute_info,
            dst_compute_info,
            block_migration,
            disk_over_commit,
        )

    def check_can_live_migrate_source(
        self,
        context: Any,
        instance: Any,
        dest_check_data: Any,
        block_device_info: Any = None,
    ) -> Any:
        """The same at the source.

        :raises MigrationPreCheckError: it cannot.
        """
        data = super().check_can_live_migrate_source(
            context, instance, dest_check_data, block_device_info
        )
        self._check(instance, self._check_source, context, data, block_device_info)
        return data

    def _check(self, instance: Any, check: Callable[..., None], *args: Any) -> None:
        """Check what is required; whatever else there is can still be the ordinary migration."""
        try:
            policy = self._policy(instance)
        except exception.ConfigurationError as error:
            raise nova_exception.MigrationPreCheckError(reason=error.kwargs["reason"]) from error
        if policy is not Policy.REQUIRED:
            return
        try:
            check(instance, *args)
        except Exception as error:  # noqa: BLE001 - a package may be missing, or not fit
            why = getattr(error, "kwargs", {}).get("reason", error)
            raise nova_exception.MigrationPreCheckError(
                reason=f"nova-dmigrate is required, but {why}"
            ) from error

    def _check_destination(self, instance: Any, compute_info: Any) -> None:
        from nova_dmigrate.virt import conditions

        conditions.at_destination(instance.uuid, compute_info["host"], self._configuration())

    def _check_source(
        self, instance: Any, context: Any, migrate_data: Any, block_device_info: Any
    ) -> None:
        from nova_dmigrate.virt import conditions
        from nova_dmigrate.virt.guest import NovaGuest

        guest = self._host.get_guest(instance)
        disks: Any = ()
        if migrate_data.block_migration:
            _, disks = self._live_migration_copy_disk_paths(context, instance, guest)
        way = conditions.NovasWay(self._get_migration_flags(migrate_data.block_migration), disks)
        mapping = driver.driver.block_device_info_get_mapping(block_device_info)
        facts, config = NovaGuest(guest).facts, self._configuration()
        conditions.at_source(
            facts,
            way,
            [each["connection_info"] for each in mapping if each["connection_info"]],
            conditions.request_for(facts, Policy.REQUIRED, config, instance.host),
            config,
        )

    # The migration

    @_taking_the_same_as(driver.LibvirtDriver._live_migration)
    def _live_migration(self, context: Any, instance: Any, *args: Any, **kwargs: Any) -> None:
        """As libvirt's. The policy is decided before it, and once: what it depends on may have to
        be loaded, and Nova's monitor and operation, which it starts, use one context."""
        try:
            policy = self._policy(instance)
        except exception.ConfigurationError as error:
            # It was another one when that was checked
            LOG.error("%s; the migration is Nova's own", error)
            policy = Policy.DISABLED
        self._decided[instance.uuid] = policy
        super()._live_migration(context, instance, *args, **kwargs)

    def _live_migration_operation(
        self,
        context: Any,
        instance: Any,
        dest: str,
        block_migration: Any,
        migrate_data: Any,
        guest: Any,
        device_names: Any,
    ) -> None:
        """Migrate, in a thread of its own, beside which Nova's monitor runs."""
        operation = functools.partial(
            super()._live_migration_operation,
            context,
            instance,
            dest,
            block_migration,
            migrate_data,
            guest,
            device_names,
        )
        policy = self._decided.pop(instance.uuid, Policy.DISABLED)
        if policy is Policy.DISABLED:
            operation()
            return
        try:
            relaying = self._relaying_for(policy, context, instance, dest, migrate_data, guest)
        except Exception as error:  # noqa: BLE001 - a package that is missing, or does not fit, ...
            if policy is Policy.REQUIRED:
                raise nova_exception.MigrationError(reason=_NOT_USABLE % error) from error
            LOG.error(_NOT_USABLE, error)
            operation()
            return
        self._relaying[instance.uuid] = relaying
        try:
            relaying.run(operation, device_names)
        finally:
            del self._relaying[instance.uuid]

    def _relaying_for(
        self,
        policy: Policy,
        context: Any,
        instance: Any,
        dest: str,
        migrate_data: Any,
        guest: Any,
    ) -> Any:
        from nova_dmigrate.virt.preparing import Order
        from nova_dmigrate.virt.relaying import Relaying

        order = Order(
            instance=instance,
            guest=guest,
            apart=self._host._wrap_libvirt_proxy,
            policy=policy,
            flags=self._get_migration_flags(migrate_data.block_migration),
            destination=dest,
            migrate_data=migrate_data,
            bandwidth=CONF.libvirt.live_migration_bandwidth * _MIB,
            downtime_limit=next(libvirt_migration.downtime_steps(1))[1],
        )
        tell = functools.partial(self._tell, context, instance.host)
        return Relaying(order, self._configuration, tell)

    def _tell(self, context: Any, host: str, summary: Any) -> None:
        from nova_dmigrate.virt import report

        report.tell(context, host, self._config, summary)

    def live_migration_abort(self, instance: Any) -> None:
        """Abort; libvirt knows nothing yet of a migration that is being prepared."""
        # Libvirt's own takes anything here that its guests are found by: all else is left to it
        relaying = self._relaying.get(instance.uuid) if self._relaying else None
        if relaying is not None and relaying.cancel():
            LOG.info("Instance %s: its migration is cancelled before it begins", instance.uuid)
            return
        super().live_migration_abort(instance)

    # Evacuation

    @_taking_the_same_as(driver.LibvirtDriver.rebuild)
    def rebuild(
        self, context: Any, instance: Any, *args: Any, evacuate: bool = False, **kwargs: Any
    ) -> Any:
        """Note servers that come from a host that has failed; the rest is as it is without us."""
        if evacuate:
            self._note_evacuation(instance)
        return super().rebuild(context, instance, *args, evacuate=evacuate, **kwargs)

    @_taking_the_same_as(driver.LibvirtDriver.power_on)
    def power_on(self, context: Any, instance: Any, *args: Any, **kwargs: Any) -> Any:
        """Since microversion 2.95 a server that was evacuated waits for this, which may be for
        longer than a nova-compute runs."""
        result = super().power_on(context, instance, *args, **kwargs)
        try:
            if instance.system_metadata.pop(_EVACUATED, None) is not None:
                self._warm_up(instance)
            elif self._evacuations is not None:
                self._evacuations.powered_on(instance.uuid, CONF.host, self._facts(instance))
        except Exception:  # noqa: BLE001 - it is started
            LOG.exception(_NOT_WARMED, instance.uuid)
        return result

    def _note_evacuation(self, instance: Any) -> None:
        """Have the agent asked when it is there. Nothing of this may keep the server from it."""
        try:
            if self._policy(instance) is not Policy.DISABLED:
                # Nova's manager saves it with what it notes of the server anyway
                instance.system_metadata[_EVACUATED] = "yes"
                self._warm_up(instance)
        except Exception:  # noqa: BLE001 - a package that does not fit, no further thread, ...
            LOG.exception(_NOT_WARMED, instance.uuid)

    def _warm_up(self, instance: Any) -> None:
        from nova_dmigrate.virt.evacuation import Evacuations

        if self._evacuations is None:
            self._evacuations = Evacuations(self._configuration)
        # Nova notes the instance's new host afterwards
        self._evacuations.arrived(instance.uuid, CONF.host, self._facts(instance))

    def _facts(self, instance: Any) -> Callable[[], Any]:
        """Describes the instance's domain, once there is one."""

        def facts() -> Any:
            from nova_dmigrate.virt.guest import NovaGuest

            return NovaGuest(self._host.get_guest(instance)).facts

        return facts

    # Policy and configuration

    def _policy(self, instance: Any) -> Policy:
        """The server's policy; none of ours if what it depends on cannot be had.

        :raises ConfigurationError: what is said is no policy.
        """
        default = Policy(CONF.dmigrate.default_policy)
        try:
            return decide(instance, default, CONF.dmigrate.policy_from_metadata).policy
        except exception.ConfigurationError:
            raise
        except Exception as error:  # noqa: BLE001 - Nova loads what is missing, which may fail
            LOG.warning("The policy of %s is not known: %s: %s", instance, type(error), error)
            return Policy.DISABLED

    def _configuration(self) -> cfg.ConfigOpts:
        """nova-dmigrate's own.

        :raises ConfigurationError: it cannot be read.
        """
        with self._config_lock:
            if self._config is None:
                self._config = configuration.load(CONF)
            return self._config
