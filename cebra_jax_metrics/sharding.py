"""Work spread over the devices of a mesh, which may belong to several processes and hosts."""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cebra_jax_metrics.arrays import is_traced


def spread(
    function: Callable[..., Any],
    shared: tuple[Any, ...],
    items: Any,
    *,
    mesh: Mesh | None = None,
    axis_name: str | None = None,
    reduces: bool = False,
    **options: Hashable,
) -> Any:
    """Apply a function to a stack of items, each device of a mesh working on its share of them.

    The items are batches, models, shifts, seeds or whatever has a leading axis: their number need
    not be a multiple of that of the devices. Of a function of one item, pass its ``jax.vmap``.

    Args:
        function: ``function(*shared, items, **options)``, pure, and one and the same object in all
            calls, so that it is compiled once. What it returns has the leading axis of the items,
            each row depending on one of them.
        shared: Pytrees of arrays that every device needs as a whole.
        items: A pytree of arrays with the same leading axis.
        mesh: The devices; ``None`` applies the function to all items at once, as it is.
        axis_name: The axis of the mesh that the items are spread over; it may be left out if there
            is only one. Along others the work is repeated.
        reduces: Whether the function brings together itself what the devices found, by collectives
            over ``axis_name=``, which it is given (``None`` without a mesh), as is the ``number``
            of items; what it gets behind the last of them is a copy. It returns the same on all.
        **options: Static arguments of the function.

    Returns:
        What the function returns for all items, sharded over the mesh if their number is a multiple
        of that of the devices.

    Raises:
        ValueError: The mesh has no such axis or devices of several kinds, there are no items, or
            fewer than processes.

    >>> import jax
    >>> mesh = jax.make_mesh((jax.device_count(),), ("devices",))
    >>> spread(jax.vmap(jax.numpy.sum), (), jax.numpy.eye(3), mesh=mesh).tolist()
    [1.0, 1.0, 1.0]
    """
    lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(items)}
    if len(lengths) != 1 or lengths & {(), (0,)}:
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(items)]
        raise ValueError(f"Items have to share a leading axis that is not empty, got {shapes}.")
    ((number,),) = lengths
    if mesh is None:
        alone = {"axis_name": None, "number": number} if reduces else {}
        return function(*shared, items, **options, **alone)
    mesh, axis_name = checked_mesh(mesh, axis_name)
    check_enough("items", number, mesh)
    items = _padded(items, number, mesh.shape[axis_name])
    shared = placed(shared, mesh, PartitionSpec())
    items = placed(items, mesh, PartitionSpec(axis_name))
    if reduces:
        options |= {"axis_name": axis_name, "number": number}
    result = _spread(
        function, shared, items, mesh, axis_name, reduces, tuple(sorted(options.items()))
    )
    return result if reduces else _first(result, number)


@partial(jax.jit, static_argnames=("function", "mesh", "axis_name", "reduces", "options"))
def _spread(
    function: Callable[..., Any],
    shared: tuple[Any, ...],
    items: Any,
    mesh: Mesh,
    axis_name: str,
    reduces: bool,
    options: tuple[tuple[str, Hashable], ...],
) -> Any:
    whole, split = PartitionSpec(), PartitionSpec(axis_name)
    return jax.shard_map(
        lambda shared, items: function(*shared, items, **dict(options)),
        mesh=mesh,
        in_specs=(whole, split),
        out_specs=whole if reduces else split,
        check_vma=False,  # the samplers' and the searches' loops do not say how they vary
    )(shared, items)


def first_item(length: int, axis_name: str | None) -> Any:
    """Number of the first of this device's items, within a function that ``reduces``."""
    return 0 if axis_name is None else lax.axis_index(axis_name).astype(int) * length


def checked_mesh(mesh: Mesh, axis_name: str | None) -> tuple[Mesh, str]:
    """The mesh with axes that JAX may shard over as it likes, and the axis to spread over.

    Raises:
        TypeError: It is no mesh.
        ValueError: There is no such axis, or the devices are of several kinds.
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"mesh has to be a jax.sharding.Mesh, such as jax.make_mesh((8,), ('devices',)), got "
            f"{type(mesh).__name__}."
        )
    if axis_name is None:
        if len(mesh.axis_names) != 1:
            raise ValueError(
                f"The mesh has the axes {mesh.axis_names}: pass the one to spread over as "
                "axis_name."
            )
        (axis_name,) = mesh.axis_names
    if axis_name not in mesh.axis_names:
        raise ValueError(
            f"The mesh has no axis {axis_name!r}: axis_name has to be one of {mesh.axis_names}."
        )
    kinds = sorted({f"{device.platform} ({device.device_kind})" for device in mesh.devices.flat})
    if len(kinds) > 1:
        raise ValueError(
            f"The devices of a mesh have to be of one kind, got {' and '.join(kinds)}: make a mesh "
            "of some of them, and one call for each."
        )
    return _auto(mesh), axis_name


def _auto(mesh: Mesh) -> Mesh:
    """The same mesh with axes that JAX may shard over as it likes."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)


def as_auto(x: Array) -> Array:
    """A known array whose sharding is no part of its type, so that all operations apply."""
    sharding = x.sharding
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return x
    return jax.device_put(x, NamedSharding(_auto(sharding.mesh), sharding.spec))


def check_enough(what: str, number: int, mesh: Mesh) -> int:
    """The number of processes; less work than that is refused, which some would only repeat."""
    processes = len({device.process_index for device in mesh.devices.flat})
    if number < processes:
        raise ValueError(
            f"There are {processes} processes, but only {number} {what} to spread over them: start "
            "fewer processes, or ask for more work."
        )
    return processes


def placed(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """Known arrays, the same in all processes, put where the mesh needs them."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: x if is_traced(x) else _placed(x, sharding), tree)


def _placed(x: Any, sharding: NamedSharding) -> Array:
    if isinstance(x, Array) and (x.sharding == sharding or not x.is_fully_addressable):
        return jax.device_put(x, sharding)
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if isinstance(x, Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _placed(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    # Unlike device_put this does not ask all processes whether they have the same.
    known = np.asarray(jnp.asarray(x))
    return jax.make_array_from_callback(known.shape, sharding, known.__getitem__)


def from_shares(
    make: Callable[[int, int], Any],
    number: int,
    mesh: Mesh | None = None,
    axis_name: str | None = None,
) -> Any:
    """Items that are made on the host, each process making those of its own devices only.

    Args:
        make: ``make(start, stop)`` returns items start to stop, a pytree of arrays; it can make
            more than there are, which devices need that do not divide their number.
        number: How many items there are.
        mesh: The devices; ``None`` makes all items as they are.
        axis_name: The axis of the mesh to spread them over.

    Returns:
        All items, sharded over the mesh if their number is a multiple of that of the devices.

    Raises:
        ValueError: The mesh does not fit, see :func:`spread`.
    """
    if mesh is None:
        return make(0, number)
    mesh, axis_name = checked_mesh(mesh, axis_name)
    check_enough("items", number, mesh)
    total = number + -number % mesh.shape[axis_name]
    sharding = NamedSharding(mesh, PartitionSpec(axis_name))
    places = sharding.addressable_devices_indices_map((total,)).values()
    ranges = [place[0].indices(total) for place in places if place is not None]
    start, stop = min(r[0] for r in ranges), max(r[1] for r in ranges)

    def share(rows: Any) -> Array:
        rows = np.asarray(rows)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            first, last, _ = (index or (slice(None),))[0].indices(total)
            return rows[first - start : last - start]

        return jax.make_array_from_callback((total, *rows.shape[1:]), sharding, part)

    return _first(jax.tree.map(share, make(start, stop)), number)


def _first(items: Any, number: int) -> Any:
    return jax.tree.map(lambda x: x if len(x) == number else x[:number], items)


def _padded(items: Any, number: int, multiple: int) -> Any:
    """The last item repeated, so that every device has as many."""
    missing = -number % multiple
    if not missing:
        return items
    places = np.minimum(np.arange(number + missing), number - 1)
    return jax.tree.map(
        lambda x: x[places] if isinstance(x, np.ndarray) else jnp.take(x, places, axis=0), items
    )
