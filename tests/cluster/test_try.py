import time, sys


import pytest
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_try(tiny_config):
    from fellray.actors.plant import Plant, deal
    from fellray.actors.session import connect
    from fellray.actors.world import survey
    from fellray.jobs.train import one_round
    from fellray.platform.run import open_run
    config=tiny_config(server={"engine":"deepspeed"})
    world=survey(config)
    def drive(config, make):
        a=time.time()
        with open_run(config, world.data_sha256) as run, make(config, world, run.rounds) as plant:
            b=time.time()
            for t in run.to_go():
                o=plant.replayed(one_round,t,config)
                print(run.commit(t,o,plant.close_ledger(),plant.take_events())["seconds"])
            c=time.time()
            h=run.rounds.hashes(2,["client.values","trunk.values"])
            print("make",b-a,"rounds",c-b)
            return h, run.storage
    a=drive(config,Plant.inline)
    t=time.time()
    with connect(config,5):
        for n in (1,2,5):
            print("ray",time.time()-t)
            cfg=tiny_config(name="tiny",clients={"per_actor":n},server={"engine":"deepspeed"})
            b=drive(cfg,Plant.on_ray)
            assert a[0]==b[0]
