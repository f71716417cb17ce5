//! Encryption: every mode, with the clients that people use, and with those that mean no good.

use crate::support::{MIB, Raw, Server, run, run_any};
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;
use torus_frontends::nbd::{ClientCertificates, Offer, TlsMode, TlsOffer};

const STARTTLS: u32 = 5;
const ACK: u32 = 1;
const POLICY: u32 = (1 << 31) + 2;
const TLS_REQUIRED: u32 = (1 << 31) + 5;

/// An authority, a server's certificate, and a client's; of `stranger` the authority is another one.
pub struct Certificates {
    directory: TempDir,
}

impl Certificates {
    pub fn make() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        for folder in ["good", "stranger"] {
            let path = directory.path().join(folder);
            std::fs::create_dir(&path).expect("a new folder");
            make_authority(&path);
            sign(&path, "server", "subjectAltName=DNS:localhost,IP:127.0.0.1");
            sign(&path, "client", "extendedKeyUsage=clientAuth");
        }
        let anonymous = directory.path().join("anonymous");
        std::fs::create_dir(&anonymous).expect("a new folder");
        let authority = directory.path().join("good/ca-cert.pem");
        std::fs::copy(authority, anonymous.join("ca-cert.pem")).expect("a copy");
        // A stranger's client knows our server, but we do not know the client.
        let (ours, theirs) = (directory.path().join("good"), directory.path().join("stranger"));
        std::fs::copy(ours.join("ca-cert.pem"), theirs.join("ca-cert.pem")).expect("a copy");
        Self { directory }
    }

    fn path(&self, folder: &str) -> PathBuf {
        self.directory.path().join(folder)
    }

    pub fn offer(&self, mode: TlsMode, clients: ClientCertificates) -> Offer {
        let tls = TlsOffer::load(mode, &self.path("good"), clients).expect("good certificates");
        Offer { tls, ..Offer::default() }
    }
}

fn openssl(folder: &Path, arguments: &str) {
    let output = Command::new("openssl").current_dir(folder).args(arguments.split(' ')).output();
    let output = output.unwrap_or_else(|error| panic!("openssl cannot be run ({error}); install openssl"));
    assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

const KEY: &str = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";

fn make_authority(folder: &Path) {
    let usage = "-addext keyUsage=critical,keyCertSign";
    openssl(
        folder,
        &format!("req -x509 {KEY} -days 2 -subj /CN=authority {usage} -keyout ca-key.pem -out ca-cert.pem"),
    );
}

fn sign(folder: &Path, who: &str, extension: &str) {
    openssl(folder, &format!("req {KEY} -subj /CN={who} -keyout {who}-key.pem -out {who}.csr"));
    std::fs::write(folder.join("extensions"), extension).expect("a file");
    let authority = "-CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial";
    openssl(folder, &format!("x509 -req -in {who}.csr {authority} -days 2 -extfile extensions -out {who}-cert.pem"));
}

/// What libnbd needs to talk TLS to a server.
fn uri(server: &Server, certificates: &Path) -> String {
    let address = server.address.expect("a TCP server");
    format!("nbds://localhost:{}/disk?tls-certificates={}", address.port(), certificates.display())
}

#[test]
fn clients_copy_and_compare_over_tls() {
    let certificates = Certificates::make();
    for mode in [TlsMode::Allow, TlsMode::Require] {
        let server = Server::offering(certificates.offer(mode, ClientCertificates::Ignored), 16 * MIB);
        let client = certificates.path("anonymous");
        let uri = uri(&server, &client);
        let said = run("nbdinfo", &["--json", &uri]);
        let info: serde_json::Value = serde_json::from_str(&said).expect("JSON");
        assert_eq!((&info["TLS"], &info["structured"]), (&true.into(), &true.into()), "{said}");
        let (source, copy) = (certificates.path("source"), certificates.path("copy"));
        let data: Vec<u8> = (0..16_u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        std::fs::write(&source, &data).expect("a file");
        let text = |path: &Path| path.to_str().expect("a plain name").to_owned();
        run("nbdcopy", &["--connections=8", "--flush", &text(&source), &uri]);
        run("nbdcopy", &["--connections=8", &uri, &text(&copy)]);
        assert!(std::fs::read(&copy).expect("the copy") == data, "the copy differs");
        let credentials = format!("tls-creds-x509,id=t,endpoint=client,dir={}", client.display());
        let port = server.address.expect("TCP").port();
        let image = format!("driver=nbd,host=localhost,port={port},export=disk,tls-creds=t");
        let convert = ["convert", "--object", &credentials, "--image-opts", &image, "-O", "raw", &text(&copy)];
        run("qemu-img", &convert);
        assert!(std::fs::read(&copy).expect("the copy") == data, "QEMU's copy differs");
        let raw = format!("driver=raw,file.filename={}", text(&source));
        run("qemu-img", &["compare", "--object", &credentials, "--image-opts", &image, &raw]);
        run("qemu-img", &["map", "--object", &credentials, "--image-opts", &image]);
        let said = run(
            "qemu-io",
            &[
                "--object",
                &credentials,
                "--image-opts",
                &image,
                "-c",
                "write -P 5 1000 100k",
                "-c",
                "read -P 5 1000 100k",
            ],
        );
        assert!(!said.contains("failed"), "{said}");
    }
}

#[test]
fn each_mode_takes_and_refuses_whom_it_should() {
    let certificates = Certificates::make();
    let table = [
        // mode, clients, folder of the client (or none: no TLS), whether it gets in
        (TlsMode::Off, ClientCertificates::Ignored, None, true),
        (TlsMode::Off, ClientCertificates::Ignored, Some("anonymous"), false),
        (TlsMode::Allow, ClientCertificates::Ignored, None, true),
        (TlsMode::Allow, ClientCertificates::Required, None, true),
        (TlsMode::Require, ClientCertificates::Ignored, None, false),
        (TlsMode::Require, ClientCertificates::Ignored, Some("anonymous"), true),
        (TlsMode::Require, ClientCertificates::Optional, Some("anonymous"), true),
        (TlsMode::Require, ClientCertificates::Optional, Some("good"), true),
        (TlsMode::Require, ClientCertificates::Optional, Some("stranger"), false),
        (TlsMode::Require, ClientCertificates::Required, Some("anonymous"), false),
        (TlsMode::Require, ClientCertificates::Required, Some("good"), true),
        (TlsMode::Require, ClientCertificates::Required, Some("stranger"), false),
    ];
    for (mode, clients, folder, expected) in table {
        let server = Server::offering(certificates.offer(mode, clients), MIB);
        let uri = folder.map_or(server.uri.clone(), |folder| uri(&server, &certificates.path(folder)));
        let (good, said) = run_any("nbdinfo", &["--size", &uri]);
        assert_eq!(good, expected, "{mode:?}, {clients:?}, client {folder:?}: {said}");
    }
}

#[test]
fn what_is_sent_in_the_clear_behind_starttls_is_never_taken_for_options() {
    let certificates = Certificates::make();
    let server = Server::offering(certificates.offer(TlsMode::Allow, ClientCertificates::Ignored), MIB);
    let mut raw = server.negotiating();
    // Both in one segment: a server that keeps its buffer would list its exports into the encrypted stream.
    raw.send(b"IHAVEOPT\0\0\0\x05\0\0\0\0IHAVEOPT\0\0\0\x03\0\0\0\0");
    assert_eq!(raw.option_reply().0, ACK);
    let rest = raw.closed();
    assert!(!rest.windows(4).any(|window| window == b"disk"), "{rest:?}");
    server.attached().works();
}

#[test]
fn a_handshake_that_breaks_off_or_stalls_holds_up_nobody() {
    let certificates = Certificates::make();
    let server = Server::offering(certificates.offer(TlsMode::Allow, ClientCertificates::Ignored), MIB);
    let begun = |server: &Server| -> Raw {
        let mut raw = server.negotiating();
        raw.option(STARTTLS, b"");
        assert_eq!(raw.option_reply().0, ACK);
        raw
    };
    let (mut garbage, mut half, stalled) = (begun(&server), begun(&server), begun(&server));
    garbage.send(&[0xff; 4096]);
    garbage.closed();
    half.send(&[22, 3, 1, 2, 0, 1]);
    half.stream.shutdown(std::net::Shutdown::Write).expect("connected");
    half.closed();
    server.attached().works();
    drop(stalled);
}

#[test]
fn options_are_refused_as_the_mode_demands() {
    let certificates = Certificates::make();
    let server = Server::start(MIB);
    let mut raw = server.negotiating();
    raw.option(STARTTLS, b"");
    assert_eq!(raw.option_reply().0, POLICY);
    raw.go("disk");
    raw.works();
    let server = Server::offering(certificates.offer(TlsMode::Require, ClientCertificates::Ignored), MIB);
    let mut raw = server.negotiating();
    for option in [3, 6, 7, 8, 9, 10, 11, 99] {
        raw.option(option, b"");
        assert_eq!(raw.option_reply().0, TLS_REQUIRED, "option {option}");
    }
    raw.option(1, b"disk");
    assert!(raw.closed().is_empty());
}

#[test]
fn certificates_that_cannot_be_used_are_named() {
    let certificates = Certificates::make();
    let load = |folder: &str, clients| {
        let loaded = TlsOffer::load(TlsMode::Require, &certificates.path(folder), clients);
        loaded.err().map(|error| error.to_string()).unwrap_or_default()
    };
    assert_eq!(load("good", ClientCertificates::Required), "");
    let said = load("anonymous", ClientCertificates::Ignored);
    assert!(said.contains("server-cert.pem"), "{said}");
    let good = certificates.path("good");
    std::fs::rename(good.join("ca-cert.pem"), good.join("away")).expect("there");
    let said = load("good", ClientCertificates::Required);
    assert!(said.contains("ca-cert.pem"), "{said}");
    std::fs::copy(good.join("client-key.pem"), good.join("server-key.pem")).expect("there");
    let said = load("good", ClientCertificates::Ignored);
    assert!(said.contains("cannot be used"), "{said}");
    std::fs::write(good.join("server-key.pem"), "nothing").expect("there");
    let said = load("good", ClientCertificates::Ignored);
    assert!(said.contains("private key") && said.contains("server-key.pem"), "{said}");
}
