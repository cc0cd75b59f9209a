"""What kind of street a scene shows: numbers that street.py and traffic.py fill cells by."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Style(NamedTuple):
    """Street statistics of one scene; scalars."""

    building_height: jax.Array  # mean, metres
    height_spread: jax.Array  # relative spread of building heights, 0..1
    setback: jax.Array  # metres between the sidewalk's far edge and the fronts
    gap: jax.Array  # share of building lots that stay empty (gardens, yards, fields)
    shops: jax.Array  # share of buildings with a glazed ground floor
    trees: jax.Array  # share of tree places that are used
    fences: jax.Array  # share of lots closed by a fence, wall or hedge
    furniture: jax.Array  # share of places for poles, signs, bins, hydrants, boxes that are used
    overpass: jax.Array  # probability per cell of a bridge over the road
    parked: jax.Array  # share of parking places that are used
    people: jax.Array  # mean number of pedestrians per cell (40 m, both sides)
    traffic: jax.Array  # share of traffic slots (one per about 25 m of lane) that hold a vehicle
    heavy: jax.Array  # share of vehicles that are vans, lorries and buses
    lot_width: jax.Array  # mean width of building lots along the road, metres
    attached: jax.Array  # share of buildings that fill their lot's width, wall to wall
    flat_roofs: jax.Array  # share of flat roofs
    balconies: jax.Array  # share of buildings with balconies
    garages: jax.Array  # share of buildings with a garage or an annexe at their side
    halls: jax.Array  # share of buildings that are halls: wide, few windows, large shutters
    green: jax.Array  # share of ground beyond the sidewalk that is grass; the rest is paved, gravel or dirt
    rural: jax.Array  # 1: no paved sidewalks, guard rails, wooden poles; 0: a town
    conifers: jax.Array  # share of trees outside the sidewalk that are conifers
    kind: jax.Array  # int32: index into `KINDS`


KINDS = ("downtown", "row houses", "detached", "industrial", "boulevard", "country", "shopping", "arterial")
_WEIGHTS = (0.15, 0.17, 0.15, 0.10, 0.12, 0.09, 0.13, 0.09)
#                  downt  rows   detach indus  boulev country shops arterial
_TABLE = {
    "building_height": (26.0, 9.5, 6.5, 8.5, 15.0, 6.5, 13.0, 12.0),
    "height_spread": (0.45, 0.15, 0.2, 0.35, 0.3, 0.3, 0.25, 0.5),
    "setback": (0.6, 2.2, 7.0, 9.0, 5.0, 14.0, 0.5, 6.0),
    "gap": (0.06, 0.06, 0.1, 0.3, 0.35, 0.75, 0.06, 0.3),
    "shops": (0.6, 0.06, 0.02, 0.04, 0.25, 0.03, 0.92, 0.25),
    "trees": (0.3, 0.35, 0.5, 0.25, 0.85, 0.55, 0.3, 0.4),
    "fences": (0.1, 0.6, 0.7, 0.6, 0.35, 0.4, 0.05, 0.35),
    "furniture": (0.8, 0.55, 0.4, 0.4, 0.7, 0.15, 0.9, 0.65),
    "overpass": (0.02, 0.0, 0.0, 0.03, 0.01, 0.015, 0.01, 0.06),
    "parked": (0.7, 0.75, 0.45, 0.4, 0.55, 0.05, 0.65, 0.2),
    "people": (6.0, 1.6, 0.8, 0.5, 3.0, 0.1, 8.0, 1.0),
    "traffic": (0.5, 0.25, 0.2, 0.35, 0.4, 0.25, 0.4, 0.6),
    "heavy": (0.15, 0.1, 0.08, 0.4, 0.12, 0.2, 0.15, 0.25),
    "lot_width": (17.0, 10.0, 18.0, 34.0, 17.0, 24.0, 12.0, 22.0),
    "attached": (0.9, 0.92, 0.08, 0.1, 0.55, 0.05, 0.95, 0.3),
    "flat_roofs": (0.85, 0.1, 0.08, 0.7, 0.4, 0.08, 0.4, 0.6),
    "balconies": (0.35, 0.15, 0.1, 0.02, 0.5, 0.05, 0.25, 0.35),
    "garages": (0.08, 0.15, 0.65, 0.3, 0.15, 0.5, 0.05, 0.2),
    "halls": (0.03, 0.01, 0.01, 0.75, 0.03, 0.2, 0.03, 0.3),
    "green": (0.15, 0.6, 0.9, 0.4, 0.9, 0.95, 0.1, 0.6),
    "rural": (0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0),
    "conifers": (0.05, 0.2, 0.4, 0.25, 0.2, 0.45, 0.05, 0.25),
}
_AMOUNTS = frozenset(
    ("building_height", "height_spread", "setback", "overpass", "people", "lot_width", "rural")
)  # the others are shares


def sample_style(key: jax.Array) -> Style:
    """One of several kinds of streets (`KINDS`), varied: amounts by a factor, shares in their logits."""
    of_kind, of_values = jax.random.split(key)
    kind = jax.random.categorical(of_kind, jnp.log(jnp.array(_WEIGHTS))).astype(jnp.int32)
    means = jnp.asarray(np.array(list(_TABLE.values()), np.float32).T)[kind]
    noise = jnp.clip(jax.random.normal(of_values, means.shape), -2.0, 2.0)
    amounts = means * jnp.exp(0.25 * noise)
    inside = jnp.clip(means, 0.005, 0.99)
    shares = jax.nn.sigmoid(jnp.log(inside / (1 - inside)) + 0.5 * noise)
    is_share = np.array([name not in _AMOUNTS for name in _TABLE])
    values = jnp.where(is_share, shares, amounts)
    fields = {name: values[i] for i, name in enumerate(_TABLE)}
    fields["rural"] = jnp.round(means[list(_TABLE).index("rural")])
    return Style(**fields, kind=kind)
