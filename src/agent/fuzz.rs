//! Fuzz targets of what other agents, the command line and the configuration say: see [`crate::fuzz`].

use std::cell::RefCell;
use std::time::Duration;

use super::api::{self, Event, Request};
use super::config::Config;
use super::link::{self, Frame};
use super::message::{Hello, Message, Offer};
use crate::fuzz::{Input, json};

/// Bytes of another agent, or of the command line.
pub mod agent_messages {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    thread_local! {
        static RUNTIME: RefCell<tokio::runtime::Runtime> =
            RefCell::new(tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime"));
    }

    /// The target's body.
    pub fn run(data: &[u8]) {
        let mut input = Input::new(data);
        match input.byte() {
            0 => RUNTIME.with_borrow(|runtime| {
                let once = runtime.block_on(again(input.rest()));
                assert_eq!(
                    runtime.block_on(again(&once)),
                    once,
                    "what was written is read as something else"
                );
            }),
            1 => json::<Message>(input.rest()),
            2 => json::<Request>(input.rest()),
            3 => json::<Event>(input.rest()),
            _ => {
                let bytes = input.rest();
                if let Ok(request) = api::read_frame::<Request>(&mut &bytes[..]) {
                    let again = api::encode(&request).expect("it came in a frame");
                    assert_eq!(api::read_frame::<Request>(&mut &again[..]).expect("it was written"), request);
                }
                drop(api::read_frame::<Event>(&mut &bytes[..]));
            }
        }
    }

    /// All frames up to the first that is none, written anew.
    async fn again(mut bytes: &[u8]) -> Vec<u8> {
        let mut out = std::io::Cursor::new(Vec::new());
        let most = std::sync::atomic::AtomicUsize::new(usize::MAX);
        while let Ok(Some(frame)) = link::read(&mut bytes, LONG, &most).await {
            // JSON may be written with more bytes than it was read from
            if link::write(&mut out, &frame).await.is_err() {
                break;
            }
        }
        out.into_inner()
    }

    /// See [`crate::fuzz::Target`].
    pub fn seeds() -> Vec<Vec<u8>> {
        let hello = Message::Hello(Hello { oldest: 1, newest: 1, node: "a".into(), ..Hello::default() });
        let offer = Offer { image: Default::default(), ..Offer::default() };
        let messages = [
            hello,
            Message::Offer(Box::new(offer)),
            Message::Need { digests: vec!["sha256:00".into()] },
            Message::Blob { digest: "sha256:00".into(), size: 3 },
            Message::Progress { what: "blobs".into(), done: 1, total: 2 },
            Message::Ready(Default::default()),
            Message::Started(Default::default()),
            Message::Refused(Default::default()),
            Message::Failed { failure: Default::default(), left: vec!["a lease".into()] },
            Message::Ask { migration: "m-1".into() },
            Message::Cancel { reason: "enough".into() },
            Message::Layer,
            Message::LayerEnd,
        ];
        let json = |m: &Message| serde_json::to_vec(m).expect("a message");
        let mut seeds: Vec<_> = messages.iter().map(|m| [&[1][..], &json(m)].concat()).collect();
        let mut frames = std::io::Cursor::new(vec![0]);
        frames.set_position(1);
        let all = messages.map(|m| Frame::Message(Box::new(m)));
        let more = [Frame::Data(vec![1; 9]), Frame::Entry(vec![2; 3]), Frame::LayerData(vec![0; 12])];
        RUNTIME.with_borrow(|runtime| {
            for frame in all.iter().chain(&more) {
                runtime.block_on(link::write(&mut frames, frame)).expect("a small frame");
            }
        });
        seeds.push(frames.into_inner());
        let requests = [
            Request::Migrate(api::MigrateRequest {
                container: "redis".into(),
                to: "b".into(),
                ..Default::default()
            }),
            Request::Checkpoint(Default::default()),
            Request::Restore(Default::default()),
            Request::Ps(Default::default()),
            Request::Version,
        ];
        for request in requests {
            seeds.push([&[2][..], &serde_json::to_vec(&request).expect("a request")].concat());
            seeds.push([&[4][..], &api::encode(&request).expect("a request")].concat());
        }
        let event = Event::Progress { what: "memory".into(), done: 1, total: Some(2) };
        seeds.push([&[3][..], &serde_json::to_vec(&event).expect("an event")].concat());
        seeds
    }
}

/// The agent's configuration, the command line, and the quantities in both.
pub mod agent_config {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Verb};
    use crate::migrate::quantity;
    use crate::migrate::tuning::Asked;

    /// The target's body.
    pub fn run(data: &[u8]) {
        let mut input = Input::new(data);
        let how = input.byte();
        let text = String::from_utf8_lossy(input.rest());
        match how {
            0 => {
                let Ok(config) = Config::parse(&text) else { return };
                assert!((1..=600).contains(&config.silence(0).as_secs()) && config.max_incoming > 0);
                assert!(config.images_dir.is_absolute() && config.socket.is_absolute());
                config.migration.tuning(&Asked::default());
                config.limits(0, u64::MAX, 0);
            }
            1 => {
                if let Ok(ms) = quantity::duration_ms(&text) {
                    assert_eq!(quantity::duration_ms(&format!("{ms}ms")), Ok(ms));
                }
                if let Ok(Some(rate)) = quantity::rate(&text) {
                    assert!(rate > 0);
                    assert_eq!(quantity::rate(&format!("{rate}B/s")), Ok(Some(rate)));
                }
            }
            _ => {
                let words = std::iter::once("transship").chain(text.split('\n'));
                if let Ok(Cli { verb: Verb::Migrate(migrate), .. }) = Cli::try_parse_from(words) {
                    let asked = migrate.tuning.asked();
                    json::<Asked>(&serde_json::to_vec(&asked).expect("what was asked"));
                }
            }
        }
    }

    /// See [`crate::fuzz::Target`].
    pub fn seeds() -> Vec<Vec<u8>> {
        let config = "listen = \"[::]:7000\"\nnode = \"a\"\npki = \"/p\"\nbridge = \"cni0\"\nghost_limit = 1\n\
                      silence_seconds = 3\nhost_mounts = [\"/srv\"]\nstdio = \"fifo\"\naccept_from = [\"b\"]\n\
                      max_incoming = 2\n[migration]\nmode = \"pre-copy\"\nmax_downtime = \"1.5s\"\n\
                      bandwidth = \"1Gbit/s\"\ncompress = \"zstd\"\non_post_copy_failure = \"thaw\"\nmax_rounds = 7\n";
        let migrate = "migrate\nredis\n--to\n10.0.0.2:7420\n--mode\npost-copy\n--max-downtime\n1.5s\n\
                       --bandwidth\n100MB/s\n--compress\nlz4\n--cold\n--json";
        let mut seeds = vec![[&[0][..], config.as_bytes()].concat(), [&[2][..], migrate.as_bytes()].concat()];
        for text in ["300ms", "1.5s", "2m", "100MB/s", "12.5MiB/s", "1Gbit/s", "unlimited", " .5 s"] {
            seeds.push([&[1][..], text.as_bytes()].concat());
        }
        for line in
            ["ps\n--json", "checkpoint\nredis\n--output\n/x", "restore\n/x", "doctor", "cert\nca", "version"]
        {
            seeds.push([&[2][..], line.as_bytes()].concat());
        }
        seeds
    }
}
