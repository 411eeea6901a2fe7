//! What is sent, byte for byte, beside what vhost's `Frontend` sends.

use vhost::vhost_user::message::{VhostUserHeaderFlag as Flags, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo};

use super::*;

/// Bytes and files.
type Sent = (Vec<u8>, Vec<u64>);

/// vhost's frontend, with a peer that answers before it is asked, so that no call waits.
struct Vhost {
    frontend: Frontend,
    peer: Peer,
}

impl Vhost {
    fn new() -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut this = Self {
            frontend: Frontend::from_stream(ours, 1),
            peer: Peer::new(theirs),
        };
        let features = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let all = VhostUserProtocolFeatures::all();
        this.peer
            .answer(FrontendReq::GET_FEATURES, &features.to_ne_bytes());
        assert_eq!(this.frontend.get_features().unwrap(), features);
        this.frontend.set_features(features).unwrap();
        let code = FrontendReq::GET_PROTOCOL_FEATURES;
        this.peer.answer(code, &all.bits().to_ne_bytes());
        assert_eq!(this.frontend.get_protocol_features().unwrap(), all);
        this.frontend.set_protocol_features(all).unwrap();
        this
    }

    /// What it sends, asking for acknowledgements or not, if it is answered so.
    fn sends(&mut self, flags: Flags, answer: &[u8], call: impl FnOnce(&mut Frontend)) -> Sent {
        self.peer.read_all();
        self.peer.bytes.clear();
        self.peer.calls.clear();
        self.peer.say(answer);
        self.frontend.set_hdr_flags(flags);
        call(&mut self.frontend);
        self.peer.read_all();
        sent_to(&self.peer)
    }
}

fn sent_to(peer: &Peer) -> Sent {
    let files = peer.calls.iter().flat_map(|call| call.files.clone());
    (peer.bytes.clone(), files.collect())
}

/// What a wire sends.
fn sends(message: Message) -> Sent {
    let mut pair = Pair::asking(message);
    pair.peer.read_all();
    pair.check_peer_got_all();
    sent_to(&pair.peer)
}

/// With REPLY_ACK and without: the flag of the header, the reply, and the answer that is needed.
fn both(code: FrontendReq) -> [(Flags, Reply, Vec<u8>); 2] {
    [
        (Flags::NEED_REPLY, Reply::Ack, acknowledgement(code)),
        (Flags::empty(), Reply::None, Vec::new()),
    ]
}

#[test]
fn tables_and_regions_are_sent_as_vhost_does() {
    let mut vhost = Vhost::new();
    for count in 1..=regions().len() {
        let table = &regions()[..count];
        let infos: Vec<VhostUserMemoryRegionInfo> = table.iter().map(Into::into).collect();
        for (flags, reply, answer) in both(FrontendReq::SET_MEM_TABLE) {
            let by_vhost = vhost.sends(flags, &answer, |frontend| {
                frontend.set_mem_table(&infos).unwrap();
            });
            assert_eq!(sends(Message::set_table(table, reply)), by_vhost);
            assert_eq!(by_vhost.1.len(), count);
        }
    }
    for region in regions() {
        let info = VhostUserMemoryRegionInfo::from(region);
        for (flags, reply, answer) in both(FrontendReq::ADD_MEM_REG) {
            let by_vhost = vhost.sends(flags, &answer, |frontend| {
                frontend.add_mem_region(&info).unwrap();
            });
            assert_eq!(sends(Message::add_region(region, reply)), by_vhost);
            assert_eq!(by_vhost.1, [file(region.as_fd())]);
        }
        for (flags, reply, answer) in both(FrontendReq::REM_MEM_REG) {
            let by_vhost = vhost.sends(flags, &answer, |frontend| {
                frontend.remove_mem_region(&info).unwrap();
            });
            assert_eq!(sends(Message::remove_region(region, reply)), by_vhost);
            assert!(by_vhost.1.is_empty());
        }
    }
}

#[test]
fn questions_and_logs_are_sent_as_vhost_does() {
    let eight = [7; 8];
    let mut vhost = Vhost::new();
    let answered = answer(FrontendReq::GET_FEATURES, &eight);
    let by_vhost = vhost.sends(Flags::empty(), &answered, |frontend| {
        frontend.get_features().unwrap();
    });
    assert_eq!(sends(barrier()), by_vhost);

    let answered = answer(FrontendReq::GET_MAX_MEM_SLOTS, &eight);
    let by_vhost = vhost.sends(Flags::empty(), &answered, |frontend| {
        frontend.get_max_mem_slots().unwrap();
    });
    assert_eq!(sends(Message::max_slots()), by_vhost);

    let answered = answer(FrontendReq::SET_LOG_BASE, &numbers([8, 0]));
    let by_vhost = vhost.sends(Flags::empty(), &answered, |frontend| {
        let log = VhostUserDirtyLogRegion {
            mmap_size: 0x1234_5678_9abc,
            mmap_offset: 0,
            mmap_handle: region(0).as_fd().as_raw_fd(),
        };
        frontend.set_log_base(0, Some(log)).unwrap();
    });
    assert_eq!(sends(Message::set_log(0x1234_5678_9abc, log())), by_vhost);
}

/// vhost has these only with a feature of its own.
#[test]
fn tables_for_postcopy_ask_for_no_acknowledgement_and_are_acknowledged_by_zero() {
    let (table, region) = (&regions()[..2], region(3));
    let without = sends(Message::set_table(table, Reply::None));
    assert_eq!(sends(Message::set_table(table, Reply::Bases)), without);
    let without = sends(Message::add_region(region, Reply::None));
    assert_eq!(sends(Message::add_region(region, Reply::Bases)), without);

    let by_hand = |code: FrontendReq| {
        let header = [u32::from(code), 1, 8].map(u32::to_ne_bytes);
        ([header.as_flattened(), &[0; 8]].concat(), Vec::new())
    };
    let acknowledged = |about| sends(Message::acknowledge_bases(about));
    let table = acknowledged(DaemonRequest::SetTable(2));
    assert_eq!(table, by_hand(FrontendReq::SET_MEM_TABLE));
    let added = acknowledged(DaemonRequest::AddRegion(region.range()));
    assert_eq!(added, by_hand(FrontendReq::ADD_MEM_REG));
}

/// Each byte of an answer with bases is one that must be as it was sent, or is part of a base.
#[test]
fn bases_are_read_from_an_answer_that_differs_in_nothing_else() {
    for count in 1..=3 {
        let sent = Message::set_table(&regions()[..count], Reply::Bases).body;
        let user_addrs = regions()[..count].iter().map(TableRegion::user_addr);
        assert_eq!(bases(&sent, &sent), Some(user_addrs.collect()));
        for at in 0..sent.len() {
            let mut answer = sent.clone();
            answer[at] ^= 0x80;
            let is_base = at >= 8 && (16..24).contains(&((at - 8) % 32));
            let expected = is_base.then(|| {
                let numbers = answer[8..].chunks(8).map(number);
                numbers.skip(2).step_by(4).collect::<Vec<_>>()
            });
            assert_eq!(bases(&sent, &answer), expected, "byte {at}");
        }
        assert_eq!(bases(&sent, &sent[..sent.len() - 1]), None);
        assert_eq!(bases(&sent, &sent[..7]), None);
    }
}
