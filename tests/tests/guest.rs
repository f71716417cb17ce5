//! The guest that the kernel's clients are tested in (`torus_tests::guest`): it boots, has the drivers, reaches the
//! test's network, and how its script ended is known.

use std::time::Duration;
use torus_tests::guest::Guest;
use torus_tests::network::Network;
use torus_tests::process;

const DEADLINE: Duration = Duration::from_secs(180);

const SCRIPT: &str = r#"
modprobe -a nbd aoe || exit 1
test -b /dev/nbd0 || exit 2
ping -c 1 -W 5 10.77.0.1 >/dev/null || python3 - <<'PYTHON' || exit 3
import socket
connection = socket.socket()
connection.settimeout(10)
# Nobody listens, and that he says so shows that he is reached.
raise SystemExit(0 if connection.connect_ex(('10.77.0.1', 9)) == 111 else 1)
PYTHON
touch /usr/only-here || exit 4
echo "mtu $(cat /sys/class/net/eth0/mtu), kernel $(uname -r)"
echo 'something for stderr' >&2
exit 42
"#;

#[test]
fn a_guest_runs_a_script_with_the_kernels_drivers_and_its_end_is_known() {
    let folder = process::temporary_dir("guest");
    let Some(network) = Network::with_mtu(1, 9000) else { return };
    let Some(guest) = Guest::start("guest", &network, folder.path(), SCRIPT) else { return };
    let ran = guest.finish(DEADLINE);
    assert_eq!(ran.status, Some(42), "{}", ran.told());
    assert!(ran.output.contains("mtu 9000, kernel 6."), "{}", ran.told());
    assert!(ran.output.contains("something for stderr"), "{}", ran.told());
    assert!(ran.kernel_log.contains("nbd: registered device") || ran.kernel_log.contains("aoe:"), "{}", ran.told());
    assert!(!std::path::Path::new("/usr/only-here").exists(), "the guest wrote to this machine's files");
}
