"""The published balancer, deepseek-ai/EPLB, for one layer.

It packs groups of experts onto nodes, gives the spare slots of each node to the node's busiest experts, and packs the
replicas of each node onto its GPUs.
"""

import numpy as np


def heaviest_first(weight: np.ndarray) -> np.ndarray:
    """Return the items by falling weight; equal items keep their order."""
    return np.argsort(-weight, kind="stable")


def pack(weight: np.ndarray, num_packs: int) -> tuple[np.ndarray, np.ndarray]:
    """Put the same number of items into every pack; return the pack of each item and its place in the pack.

    Items are placed heaviest first, each into the lightest pack with room (the first one in a tie). If a pack holds a
    single item, items are placed in order.

    >>> pack(np.array([1.0, 5.0, 4.0, 2.0]), 2)
    (array([0, 0, 1, 1]), array([1, 0, 0, 1]))
    """
    size = len(weight) // num_packs
    if size == 1:
        return np.arange(num_packs), np.zeros(num_packs, int)
    pack_of_item, place_in_pack = np.empty((2, len(weight)), int)
    load, held = np.zeros(num_packs), np.zeros(num_packs, int)
    for item in heaviest_first(weight):
        lightest = np.argmin(np.where(held < size, load, np.inf))
        pack_of_item[item], place_in_pack[item] = lightest, held[lightest]
        load[lightest] += weight[item]
        held[lightest] += 1
    return pack_of_item, place_in_pack


def replicate(weight: np.ndarray, num_replicas: int, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the expert of each replica, and the number of replicas of each expert.

    Every expert gets one replica. Each further replica goes to the expert with the largest load per replica (the first
    one in a tie) among those with fewer than `most` replicas.

    >>> replicate(np.array([6.0, 10.0, 1.0]), 6)
    (array([0, 1, 2, 1, 0, 1]), array([2, 3, 1]))
    """
    expert_of_replica = np.arange(num_replicas)
    count = np.ones(len(weight), int)
    for replica in range(len(weight), num_replicas):
        share = weight / count
        heaviest = np.argmax(share if most is None else np.where(count < most, share, -1.0))
        expert_of_replica[replica] = heaviest
        count[heaviest] += 1
    return expert_of_replica, count


def deepseek(weight: np.ndarray, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> np.ndarray:
    """Return the expert of each slot of one layer, by the published algorithm.

    If the groups are no multiple of the nodes, groups and nodes are ignored.

    >>> weight = np.array([9.0, 1.0, 3.0, 3.0])
    >>> deepseek(weight, 6, 2, 2, 2)                       # node 0 has experts 0 and 1, node 1 has 2 and 3
    array([0, 0, 1, 3, 2, 2])
    >>> deepseek(weight, 6, 1, 2, 2)
    array([0, 3, 0, 2, 0, 1])
    """
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    num_experts = len(weight)
    group_of_expert = np.arange(num_experts) // (num_experts // num_groups)
    node_of_group, place_in_node = pack(np.bincount(group_of_expert, weights=weight), num_nodes)
    slot_of = np.arange(num_replicas).reshape(num_nodes, num_gpus // num_nodes, -1)
    place = np.empty(num_replicas, int)
    for node in range(num_nodes):
        groups = np.flatnonzero(node_of_group == node)
        groups = groups[np.argsort(place_in_node[groups])]
        experts = np.concatenate([np.flatnonzero(group_of_expert == group) for group in groups])
        replicas, count = replicate(weight[experts], num_replicas // num_nodes)
        gpu, place_in_gpu = pack((weight[experts] / count)[replicas], num_gpus // num_nodes)
        place[slot_of[node, gpu, place_in_gpu]] = experts[replicas]
    return place
