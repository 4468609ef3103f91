from megagpt.cli.doctor.agent import Report
from megagpt.cli.doctor.hosts import Agent, _differences
from megagpt.distributed.network_cards import network_cards


def write(root, **files):
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_fastest_cards_with_a_link_are_counted(tmp_path):
    """As Linux writes them: eight ports of NDR of which one is down, and a slow card for ssh; a bridge is no card."""
    assert network_cards(tmp_path) == "unknown"
    (tmp_path / "net" / "eth0" / "device").mkdir(parents=True)
    (tmp_path / "net" / "eth1" / "device").mkdir(parents=True)
    write(tmp_path, net__eth0__speed="25000\n", net__eth1__speed="-1\n", net__docker0__speed="400000\n")
    assert network_cards(tmp_path) == "1 x 25 Gbit/s Ethernet"
    for i in range(8):
        state = "1: DOWN\n" if i == 3 else "4: ACTIVE\n"
        port = f"infiniband__mlx5_{i}__ports__1"
        write(tmp_path, **{f"{port}__state": state, f"{port}__rate": "400 Gb/sec (4X NDR)\n"})
    assert network_cards(tmp_path) == "7 x 400 Gbit/s InfiniBand"


def test_this_hosts_cards_are_read_without_an_error():
    assert network_cards()


def test_doctor_names_the_host_whose_cards_differ():
    agents = [Agent.__new__(Agent) for _ in range(3)]
    for i, agent in enumerate(agents):
        agent.name = f"h{i}"
        agent.report = Report(network={"network cards": f"{7 if i == 2 else 8} x 400 Gbit/s InfiniBand"})
    [finding] = [finding for finding in _differences(agents) if finding.check == "network"]
    assert "network cards is 8 x 400 Gbit/s InfiniBand on h0, but 7 x 400 Gbit/s InfiniBand on h2" in finding.text
    assert finding.text.endswith("given the cards and GB/s of each kind (--network 8x50,4x25)")
