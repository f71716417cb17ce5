//! How the disk is read for what a client asks.

use super::harness::*;
use torus_rpc::message::Refusal;
use torus_rpc::runtime::simulated::World;
use torus_schema::ids::BlockIndex;

/// Thirty blocks written at once, of which five were written again, each by itself.
async fn overwritten_here_and_there(world: &World) -> Client {
    let machine = Machine::new(world, 8, 128).await;
    let client = Client::create(&machine, 1).await;
    client.open().await.unwrap();
    client.write(0, 30).await.unwrap();
    client.write(50, 40).await.unwrap();
    for block in [3, 9, 10, 20, 28] {
        client.write(block, 1).await.unwrap();
    }
    client
}

#[test]
fn what_was_overwritten_here_and_there_costs_a_read_for_the_old_and_one_for_the_new() {
    simulate(1, |world| async move {
        let client = overwritten_here_and_there(&world).await;
        let before = client.machine.disk.counts().reads;
        let found = client.read(0, 30).await.expect("the harness compares the bytes");
        assert_eq!(client.machine.disk.counts().reads - before, 2);
        let (first, last) = (found[0].0, found[28].0);
        assert!(first < last && found[27].0 == first && found[29].0 == first, "{found:?}");
    });
}

#[test]
fn a_damaged_block_among_them_is_told_and_the_others_are_read() {
    simulate(1, |world| async move {
        let client = overwritten_here_and_there(&world).await;
        client.rot(5);
        client.rot(20);
        for damaged in [5, 20] {
            let refused = client.read(0, 30).await.expect_err("it is damaged");
            assert!(matches!(refused, Refusal::Damaged { block } if block == BlockIndex(damaged)), "{refused:?}");
            client.write(damaged, 1).await.unwrap();
        }
        client.read(0, 30).await.expect("nothing is damaged any more");
    });
}
